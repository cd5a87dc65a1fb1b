"""Refusals of a server: one outcome for both protocols.

``OUTCOMES`` is the whole table; an error that is not in it is the server's own fault.
"""

from __future__ import annotations

from dataclasses import dataclass

from offramp.errors import (
    AuthenticationError,
    InvalidArgumentError,
    LinkTimeoutError,
    OffloadError,
    PayloadError,
    ServerBusyError,
    reason,
)


class ModelNotFoundError(InvalidArgumentError):
    """There is no model of that name or version here."""


class PayloadTooLargeError(PayloadError):
    """A request is larger than the server takes."""


class EncodingError(PayloadError):
    """A request is compressed by means that the server does not know."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a request.

    Attributes:
        name: In the metrics.
        http_status: In HTTP.
        grpc_code: Name of the status code in gRPC.
    """

    name: str
    http_status: int
    grpc_code: str


ANSWERED = Outcome(name="answered", http_status=200, grpc_code="OK")
CANCELLED = Outcome(name="cancelled", http_status=499, grpc_code="CANCELLED")
FAILED = Outcome(name="failed", http_status=500, grpc_code="INTERNAL")
_INVALID = Outcome(name="invalid", http_status=400, grpc_code="INVALID_ARGUMENT")
OUTCOMES: dict[type[BaseException], Outcome] = {
    AuthenticationError: Outcome(
        name="unauthenticated", http_status=401, grpc_code="UNAUTHENTICATED"
    ),
    ModelNotFoundError: Outcome(name="not_found", http_status=404, grpc_code="NOT_FOUND"),
    PayloadTooLargeError: Outcome(
        name="too_large", http_status=413, grpc_code="RESOURCE_EXHAUSTED"
    ),
    EncodingError: Outcome(name="invalid", http_status=415, grpc_code="UNIMPLEMENTED"),
    ServerBusyError: Outcome(name="busy", http_status=503, grpc_code="UNAVAILABLE"),
    LinkTimeoutError: Outcome(name="deadline", http_status=504, grpc_code="DEADLINE_EXCEEDED"),
    OffloadError: Outcome(name="unreachable", http_status=503, grpc_code="UNAVAILABLE"),
    PayloadError: _INVALID,
    InvalidArgumentError: _INVALID,
}
"""From an error to how the request ended; subclasses come before their bases."""


def outcome_of(error: BaseException) -> Outcome:
    """Find out how a request ended that raised an error."""
    return next((found for kind, found in OUTCOMES.items() if isinstance(error, kind)), FAILED)


def words_of(error: BaseException) -> str:
    """Message to the client: one line, and nothing of the server's inside."""
    if outcome_of(error) is FAILED:
        return "The model failed on this request; the server's log says why."
    return reason(error)
