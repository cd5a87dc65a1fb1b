"""Choosing the exits that a network keeps, where only the last are asked for."""

from __future__ import annotations

from offramp.errors import InvalidArgumentError


def kept_exits(ends: tuple[int, ...], num_exits: int | None) -> tuple[int, ...]:
    """The last exits of a network; the stages before them are to be merged."""
    num_exits = len(ends) if num_exits is None else num_exits
    if not 1 <= num_exits <= len(ends):
        raise InvalidArgumentError(
            f"The 'num_exits' parameter must be an int in [1, {len(ends)}]. Got {num_exits}."
        )
    return ends[len(ends) - num_exits :]


def is_plain(num_exits: int | None) -> bool:
    """Tell if a network that saves inside is asked for as a plain one, without what saves."""
    if num_exits not in (None, 1):
        raise InvalidArgumentError(
            "The 'num_exits' parameter must be 1, for the plain network, or None: this network "
            f"has one exit. Got {num_exits}."
        )
    return num_exits == 1
