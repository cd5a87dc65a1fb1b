"""Running less must answer what choosing afterwards answers, whichever engine runs. No torch.

Shapes: ``K`` exits, ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import OfframpError
from offramp.measure.arrays import as_array
from offramp.results import AdaptiveResult

DECISION_TOLERANCE = 1e-4
"""Samples whose confidence lies this near a threshold may leave at another exit, run another block,
or lose a token in another layer."""

SINGLE_SAMPLES = 64
"""Samples that are also compared one by one, which a bundle answers by another file; at most."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Comparison of a runner's answers with choosing afterwards.

    Attributes:
        num_samples: Samples compared.
        moved: Samples that left by another exit, or ran other blocks or tokens.
        moved_far: Those of them whose confidences all lie away from the thresholds.
        differences: Largest difference of the logits at each exit, over the samples that went the
            same way in both; 0 where there is none.
        differs: Whether a difference is beyond rounding (1e-4, or 1e-3 of the value).
    """

    num_samples: int
    moved: int
    moved_far: int
    differences: tuple[float, ...]
    differs: bool

    @property
    def holds(self) -> bool:
        """True if both say the same but for at most one sample in a thousand, and for rounding."""
        few = self.moved <= max(1, self.num_samples / 1000)
        return few and self.moved_far == 0 and not self.differs


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Answers where everything was computed and chosen afterwards, in any engine.

    Attributes:
        output: Raw logits, shape (B, C), or dense ones.
        exit_index: The exits that were chosen, shape (B,), int64.
        num_exits: Exits of the network.
        work: How much of each part counted, as ``AdaptiveResult.work``.
        columns: Parts that are compared: all if None.
        is_near: Says, for each part that is compared, whether rounding may decide that a sample
            parts there, shape (B, columns), bool. A function, since timing needs none of it.
    """

    output: Any
    exit_index: Any
    num_exits: int
    work: Any
    columns: Sequence[int] | None = None
    is_near: Callable[[], Any]


def compare(result: AdaptiveResult[Any], reference: Reference) -> Agreement:
    """Compare the answers of a runner of any engine with choosing afterwards."""
    expected, chosen_B = as_array(reference.output), as_array(reference.exit_index)
    columns = slice(None) if reference.columns is None else list(reference.columns)
    went_alike_BS = (as_array(result.work) == as_array(reference.work))[:, columns]
    went_alike_B = went_alike_BS.all(1)
    # Rounding may decide where the ways part; what comes after that sees other features.
    parting_B = went_alike_BS.argmin(1)
    is_near_B = as_array(reference.is_near())[np.arange(len(expected)), parting_B]
    gap = np.abs(as_array(result.output) - expected)
    is_within = gap <= DECISION_TOLERANCE + 1e-3 * np.abs(expected)
    is_beyond_B = ~is_within.reshape(len(expected), -1).all(1)
    exits = [went_alike_B & (chosen_B == k) for k in range(reference.num_exits)]
    return Agreement(
        num_samples=len(expected),
        moved=int((~went_alike_B).sum()),
        moved_far=int((~went_alike_B & ~is_near_B).sum()),
        differences=tuple(float(gap[here_B].max()) if here_B.any() else 0.0 for here_B in exits),
        differs=bool((is_beyond_B & went_alike_B).any()),
    )


def is_near(confidence_KB: Any, thresholds: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Find samples that may leave at another exit, because rounding decides, shape (B, 1)."""
    gap_KB = np.abs(as_array(confidence_KB)[: len(thresholds)] - np.array(thresholds)[:, None])
    near_B1: npt.NDArray[np.bool_] = (gap_KB < DECISION_TOLERANCE).any(0)[:, None]
    return near_B1


def require_agreement(agreement: Agreement) -> None:
    """Raise OfframpError if answers are not those of choosing afterwards."""
    if not agreement.holds:
        raise OfframpError(
            "Running less should answer what choosing afterwards answers, but "
            f"{agreement.moved} of {agreement.num_samples} samples went another way and logits "
            f"differ by up to {max(agreement.differences):.2g}. Nothing was timed: please report "
            "this."
        )
