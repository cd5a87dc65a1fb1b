"""A policy and what it reached on the data that chose it, as figures and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from offramp.calibration.asked import Asked
from offramp.calibration.logits import Figures
from offramp.policy.as_dict import policy_to_dict
from offramp.policy.choice import Choice
from offramp.policy.policies import ThresholdedPolicy
from offramp.runtime.answers import rule_in_words
from offramp.tables import Lines, Printed, Table, percent, points, thresholds_in_words


@dataclass(frozen=True, kw_only=True)
class ExitOfCalibration:
    """An exit under a policy, on calibration data.

    Attributes:
        index: Its number in the network.
        share: Of the samples that leave there, a fraction.
        macs: Of a sample that leaves there.
    """

    index: int
    share: float
    macs: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Calibration(Printed, Choice):
    """A policy and what it reached on the data that chose it; print it for a table.

    Attributes:
        policy: The policy with its thresholds.
        accuracy: Adaptive accuracy on the calibration data, a fraction; of pixels, where every
            pixel has a class.
        mean_macs: Mean MACs per sample on the calibration data.
        mean_iou: Mean IoU on the calibration data; None where a sample has one class.
        final_exit: What the final exit alone reached there; None where that is not known, as are
            the next four.
        plain_macs: MACs per sample of the plain network.
        num_samples: Calibration samples.
        exits: Of each exit, its number, the share of samples that leave there, and their MACs.
        asked: The target that the policy was chosen for.
    """

    policy: ThresholdedPolicy
    accuracy: float
    mean_macs: float
    mean_iou: float | None = None
    final_exit: Figures | None = None
    plain_macs: int | None = None
    num_samples: int | None = None
    exits: tuple[ExitOfCalibration, ...] | None = None
    asked: Asked | None = field(default=None, compare=False)

    def policy_of(self, kind: type[Any]) -> Any:
        """The policy."""
        return self.policy

    @property
    def quality(self) -> float:
        """The figure that counts: mean IoU where there is one, else accuracy."""
        return self.accuracy if self.mean_iou is None else self.mean_iou

    def _title(self) -> str:
        on = "" if self.num_samples is None else f", on {self.num_samples:,} calibration samples"
        return f"thresholds of {rule_in_words(policy_to_dict(self.policy))}{on}"

    def _parts(self) -> list[Table | Lines]:
        rows = [
            (
                str(row["exit"]),
                thresholds_in_words([row["threshold"]] if "threshold" in row else []) or "-",
                percent(row.get("share")),
                f"{row['macs']:,}" if "macs" in row else "-",
            )
            for row in self._records()
        ]
        return [Table(("exit", "threshold", "samples leaving", "MACs"), rows), Lines(self._lines())]

    def _records(self) -> list[dict[str, Any]]:
        numbers = range(self.policy.num_exits)
        leaving = {} if self.exits is None else dict(zip(numbers, self.exits, strict=True))
        thresholds = dict(enumerate(self.policy.thresholds))
        return [
            {"exit": leaving[k].index if k in leaving else k}
            | ({"threshold": thresholds[k]} if k in thresholds else {})
            | ({"share": leaving[k].share, "macs": leaving[k].macs} if k in leaving else {})
            for k in numbers
        ]

    def _lines(self) -> list[tuple[str, str]]:
        name = "accuracy" if self.mean_iou is None else "mean IoU"
        quality, macs = percent(self.quality), f"{self.mean_macs:,.0f}"
        if self.final_exit is not None:
            final = self.final_exit.quality
            quality += f", a drop of {points(final - self.quality)} from {percent(final)}"
        if self.plain_macs is not None:
            share = percent(self.mean_macs / self.plain_macs)
            macs += f", {share} of the plain network's {self.plain_macs:,}"
        lines = [(name, quality), ("mean MACs", macs)]
        return lines if self.asked is None else [*lines, ("asked", self.asked.in_words(of=name))]
