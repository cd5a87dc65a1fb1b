"""Policies of networks that one threshold steers inside: gates of blocks, and tokens that halt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from offramp.errors import InvalidArgumentError


@dataclass(frozen=True)
class RoutingPolicy:
    """One threshold for a whole network that has one exit.

    Args:
        threshold: In [0, 1].
    Raises:
        InvalidArgumentError: If it is NaN or outside [0, 1].
    """

    num_exits: ClassVar[int] = 1
    kind: ClassVar[str]

    threshold: float

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InvalidArgumentError(
                f"The 'threshold' parameter must be in [0, 1]. Got {self.threshold}."
            )

    @property
    def thresholds(self) -> tuple[float]:
        """The threshold, as policies of exits have theirs."""
        return (self.threshold,)


@dataclass(frozen=True)
class GatePolicy(RoutingPolicy):
    """Run a block where its gate's probability reaches the threshold.

    Args:
        threshold: In [0, 1]; the same for all gates. 0 runs every block.
    Raises:
        InvalidArgumentError: If it is NaN or outside [0, 1].
    """

    kind: ClassVar[str] = "gates"

    threshold: float = 0.5


@dataclass(frozen=True)
class HaltingPolicy(RoutingPolicy):
    """Let a token halt where the sum of its scores reaches the threshold.

    Args:
        threshold: In [0, 1]; the same for all tokens. At 1 they stay longest, at 0 all halt after
            the first layer.
    Raises:
        InvalidArgumentError: If it is NaN or outside [0, 1].
    """

    kind: ClassVar[str] = "halting"

    threshold: float = 0.99
