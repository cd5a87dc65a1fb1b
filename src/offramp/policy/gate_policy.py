"""The policy of networks that skip blocks: how likely a gate must be to run its block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from offramp.errors import InvalidArgumentError


@dataclass(frozen=True)
class GatePolicy:
    """Run a block where its gate's probability reaches the threshold.

    Args:
        threshold: In [0, 1]; the same for all gates. 0 runs every block.
    Raises:
        InvalidArgumentError: If it is NaN or outside [0, 1].
    """

    num_exits: ClassVar[int] = 1

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise InvalidArgumentError(
                f"The 'threshold' parameter must be in [0, 1]. Got {self.threshold}."
            )
