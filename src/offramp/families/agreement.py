"""Running less must answer what choosing afterwards answers, whichever engine runs.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from offramp.errors import OfframpError
from offramp.model.multi_exit import Features, as_features
from offramp.results import AdaptiveResult


class Runner(Protocol):
    """Answers a batch, spending on each sample what it needs; any engine may do so."""

    def run(self, *inputs: Any) -> AdaptiveResult[Any]:
        """Answer a batch of inputs, each with its batch axis first."""
        ...


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

    output: Tensor
    exit_index: Tensor
    num_exits: int
    work: Tensor
    columns: Sequence[int] | None = None
    is_near: Callable[[], Tensor]


def compare(result: AdaptiveResult[Any], reference: Reference) -> Agreement:
    """Compare the answers of a runner of any engine with choosing afterwards."""
    expected = reference.output
    columns = slice(None) if reference.columns is None else list(reference.columns)
    work = torch.as_tensor(result.work, device=reference.work.device)
    went_alike_BS = (work == reference.work)[:, columns]
    went_alike_B = went_alike_BS.all(1)
    # Rounding may decide where the ways part; what comes after that sees other features.
    parting_B = went_alike_BS.int().argmin(1)
    is_near_B = reference.is_near().gather(1, parting_B[:, None])[:, 0]
    gap = (torch.as_tensor(result.output, device=expected.device) - expected).abs()
    is_within = gap <= DECISION_TOLERANCE + 1e-3 * expected.abs()
    is_beyond_B = ~is_within.flatten(1).all(-1)
    exits = [went_alike_B & (reference.exit_index == k) for k in range(reference.num_exits)]
    return Agreement(
        num_samples=len(expected),
        moved=int((~went_alike_B).sum()),
        moved_far=int((~went_alike_B & ~is_near_B).sum()),
        differences=tuple(float(gap[here_B].max()) if here_B.any() else 0.0 for here_B in exits),
        differs=bool((is_beyond_B & went_alike_B).any()),
    )


def require_agreement(agreement: Agreement) -> None:
    """Raise OfframpError if answers are not those of choosing afterwards."""
    if not agreement.holds:
        raise OfframpError(
            "Running less should answer what choosing afterwards answers, but "
            f"{agreement.moved} of {agreement.num_samples} samples went another way and logits "
            f"differ by up to {max(agreement.differences):.2g}. Nothing was timed: please report "
            "this."
        )


def answer_in_batches(
    runner: Runner, samples: Tensor | Features, *, batch_size: int
) -> AdaptiveResult[Tensor]:
    """Answer samples in batches of some size; one sample is computed in other ways than several."""
    parts = [torch.split(tensor, batch_size) for tensor in as_features(samples)]
    results = [runner.run(*batch) for batch in zip(*parts, strict=True)]

    def joined(name: str) -> Tensor:
        return torch.cat([torch.as_tensor(getattr(result, name)) for result in results])

    return AdaptiveResult(
        output=joined("output"),
        exit_index=joined("exit_index"),
        confidence=joined("confidence"),
        macs=joined("macs"),
        blocks=None if results[0].blocks is None else joined("blocks"),
        tokens=None if results[0].tokens is None else joined("tokens"),
    )
