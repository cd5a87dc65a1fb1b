"""The settings of a server; light to import, so that the command line can show them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from offramp.errors import InvalidArgumentError
from offramp.serving.tokens import check_token


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a server: its address, and how much it takes.

    Attributes:
        host: Address to listen on; this machine only, unless told.
        http_port: 0 picks a free one.
        grpc_port: 0 picks a free one; None for no gRPC.
        token: What clients must show as "authorization: Bearer TOKEN", visible ASCII; None lets
            everybody in.
        tls_cert: PEM file with the server's certificate, and those that lead to its root, for TLS
            over both protocols.
        tls_key: PEM file with its key, without a passphrase.
        max_payload_bytes: The most that a request may have, in bytes, also once it is decompressed.
        max_batch_rows: The most samples of a request, and of several that are answered together.
        max_queue_rows: Samples that may wait for a model; whoever comes then is told to try later.
        max_delay_ms: How long a batch waits for more requests while several come at a time, in
            milliseconds; a lone request never waits.
        grace_s: Seconds in which what waits is answered after a signal to stop.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = 8001
    token: str | None = field(default=None, repr=False)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_payload_bytes: int = 16 * 2**20
    max_batch_rows: int = 256
    max_queue_rows: int = 1024
    max_delay_ms: float = 2.0
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise InvalidArgumentError(f"The {name!r} must be in [0, 65535]. Got {port}.")
        for name in ("max_payload_bytes", "max_batch_rows", "max_queue_rows"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(
                    f"The {name!r} must be an int of at least 1. Got {getattr(self, name)}."
                )
        for name in ("max_delay_ms", "grace_s"):
            if not 0 <= getattr(self, name) < 1e6:
                raise InvalidArgumentError(
                    f"The {name!r} must be a number from 0 to below 1,000,000. "
                    f"Got {getattr(self, name)}."
                )
        check_token(self.token)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidArgumentError("TLS needs both 'tls_cert' and 'tls_key'. Got one of them.")

    @property
    def is_open_to_others(self) -> bool:
        """True if other machines may reach it without a token."""
        if self.token is not None or self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name: nobody knows what it will mean
            return True
