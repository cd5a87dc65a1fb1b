"""Costs of a network with exits, part by part, once they are counted: no torch.

:mod:`offramp.measure.cost` counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate


@dataclass(frozen=True, kw_only=True)
class ExitCosts:
    """MACs per sample of a multi-exit network, part by part.

    Attributes:
        stage_macs: Each stage, heads not counted.
        head_macs: Each exit head.
    """

    stage_macs: tuple[int, ...]
    head_macs: tuple[int, ...]

    @property
    def num_exits(self) -> int:
        """Number of exits, the final one counted."""
        return len(self.stage_macs)

    @property
    def plain_macs(self) -> int:
        """The plain network: every stage and the final head only."""
        return sum(self.stage_macs) + self.head_macs[-1]

    def with_decisions(self, macs: Sequence[int]) -> ExitCosts:
        """The same network under a policy that computes: what it does counts to the heads.

        Args:
            macs: MACs per sample of deciding at each exit; the final one's must be 0, since the
                plain network decides nothing.
        Returns:
            Other costs, of the same plain network.
        """
        heads = zip(self.head_macs, macs, strict=True)
        return replace(self, head_macs=tuple(head + decision for head, decision in heads))

    def exit_macs(self, off: frozenset[int] = frozenset()) -> tuple[int, ...]:
        """MACs of a sample that leaves at each exit: the stages and the heads it ran through.

        Args:
            off: Exits whose heads do not run.
        Returns:
            Cumulative MACs, one per exit.
        Example:
            >>> ExitCosts(stage_macs=(10, 20), head_macs=(1, 2)).exit_macs()
            (11, 33)
        """
        steps = zip(self.stage_macs, self.head_macs, strict=True)
        return tuple(
            accumulate(stage + (0 if k in off else head) for k, (stage, head) in enumerate(steps))
        )


def mean_costs(costs: Sequence[ExitCosts], counts: Sequence[int]) -> ExitCosts:
    """Costs of the mean sample, to the nearest MAC."""
    total = sum(counts)

    def mean(parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(
            round(sum(macs * count for macs, count in zip(of_part, counts, strict=True)) / total)
            for of_part in zip(*parts, strict=True)
        )

    return ExitCosts(
        stage_macs=mean([each.stage_macs for each in costs]),
        head_macs=mean([each.head_macs for each in costs]),
    )
