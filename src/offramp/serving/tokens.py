"""The bearer token that a server asks for and a client shows."""

from __future__ import annotations

import re

from offramp.errors import InvalidArgumentError

_TOKEN = re.compile(r"[!-~]+")


def check_token(token: str | None) -> None:
    """Make sure that a token can stand in a header."""
    if token is not None and not _TOKEN.fullmatch(token):
        raise InvalidArgumentError(
            "The 'token' must be one word of visible ASCII characters, at least one. "
            f"Got {len(token)} characters that are not."
        )
