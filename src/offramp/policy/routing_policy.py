"""Policies of networks that one threshold steers inside: gates of blocks, and tokens that halt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from offramp.errors import InvalidArgumentError

EVEN_SCORES = tuple(1 / (1 + math.exp(-step * 2 / 3)) for step in range(-9, 10))
"""Probabilities at even steps of a score, from -6 to 6: trained gates and tokens are mostly sure,
so that even steps of probability would part few of them. They are set before any sample is seen, as
a guarantee needs them to be."""


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
    shared_by: ClassVar[str]
    tried: ClassVar[tuple[float, ...]]
    """Thresholds to choose from, from the cheapest to the one at which most runs."""

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
    shared_by: ClassVar[str] = "gates"
    tried: ClassVar[tuple[float, ...]] = (1.0, *reversed(EVEN_SCORES), 0.0)

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
    shared_by: ClassVar[str] = "tokens"
    tried: ClassVar[tuple[float, ...]] = (*sorted((*EVEN_SCORES, 0.99)), 1.0)

    threshold: float = 0.99
