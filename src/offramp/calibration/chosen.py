"""A policy and what it reached on the data that chose it, as figures and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic

from typing_extensions import TypeVar

from offramp.calibration.asked import Asked
from offramp.calibration.risk import RISKS
from offramp.policy.as_dict import policy_to_dict
from offramp.policy.choice import Choice
from offramp.policy.policies import ThresholdedPolicy
from offramp.policy.routing_policy import RoutingPolicy
from offramp.runtime.answers import rule_in_words
from offramp.tables import Brief, Lines, Printed, Table, percent, points, thresholds_in_words

P = TypeVar("P", bound=ThresholdedPolicy | RoutingPolicy, default=ThresholdedPolicy)
"""The kind of policy that is chosen."""


class Judged:
    """Anything that answers are judged by: it has an accuracy, and of maps a mean IoU."""

    @property
    def quality(self) -> float:
        """The figure that counts: mean IoU where there is one, else accuracy."""
        figures: Any = self
        quality: float = figures.accuracy if figures.mean_iou is None else figures.mean_iou
        return quality


@dataclass(frozen=True, kw_only=True)
class Figures(Judged):
    """Figures of how good answers are.

    Attributes:
        accuracy: Share of right ones, a fraction; of right pixels, where every pixel has a class.
        mean_iou: Mean intersection over union; None where a sample has one class.
    """

    accuracy: float
    mean_iou: float | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class ExitAlone(Brief, Judged):
    """The network cut off at one exit, where every sample leaves; no head before it runs.

    Attributes:
        index: The exit's number in the network, from 0.
        accuracy: On the test data, a fraction.
        macs: MACs per sample.
        mean_iou: On the test data; None where a sample has one class.
    """

    index: int
    accuracy: float
    macs: int
    mean_iou: float | None = None


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


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """Promise about a policy, and the samples and test that it rests on.

    Attributes:
        risk: The risk that is bounded, as ``calibrate`` names it.
        max_risk: The target.
        probability: With which it holds, over the draw of the samples; None where the promise is
            about the mean over many draws.
        method: How it was tested.
        value: The p-value of the policy; for conformal risk control, how far its bound on the mean
            risk is above the target, at most 0.
        num_samples: Calibration samples in all.
        num_tested: Of them, those that tested.
        num_finding: Samples that found the candidates, or sized the bets: the other calibration
            samples, or samples from elsewhere; 0 where none were needed.
        effective_num_samples: What the testing ones amount to after weighting.
        num_candidates: Policies that stood in a row to be tested.
        num_passed: Of them, those that passed before the first that did not.
    """

    risk: str
    max_risk: float
    probability: float | None
    method: str
    value: float
    num_samples: int
    num_tested: int
    num_finding: int
    effective_num_samples: float
    num_candidates: int
    num_passed: int

    def sentence(
        self, population: str, *, way: str = "early exit", last: str = "the final exit"
    ) -> str:
        """The promise in one sentence that a person can quote.

        Args:
            population: What the samples were drawn from.
            way: What answers cheaply.
            last: What it is compared with.
        Returns:
            The sentence.
        """
        what = RISKS[self.risk].in_words(self.max_risk, way, last)
        drawn = f"{self.num_samples:,} calibration samples ({population})"
        if self.probability is None:
            return f"On average over draws of {drawn}, {what} on new samples drawn alike."
        return (
            f"With probability at least {100 * self.probability:g} % over the draw of {drawn}, "
            f"{what} on new samples drawn alike."
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Calibration(Printed, Choice, Judged, Generic[P]):
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
        guarantee: What is promised of the policy; None where nothing is.
        candidates: Policies that stood to be tested for it, the safest first.
    """

    policy: P
    accuracy: float
    mean_macs: float
    mean_iou: float | None = None
    final_exit: Figures | None = None
    plain_macs: int | None = None
    num_samples: int | None = None
    exits: tuple[ExitOfCalibration, ...] | None = None
    asked: Asked | None = field(default=None, compare=False)
    guarantee: Guarantee | None = None
    candidates: tuple[P, ...] = field(default=(), compare=False)

    def as_policy(self) -> Any:
        """The policy."""
        return self.policy

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

    def _lines(
        self, way: str = "early exit", last: str = "the final exit"
    ) -> list[tuple[str, str]]:
        name = "accuracy" if self.mean_iou is None else "mean IoU"
        quality, macs = percent(self.quality), f"{self.mean_macs:,.0f}"
        if self.final_exit is not None:
            final = self.final_exit.quality
            quality += f", a drop of {points(final - self.quality)} from {percent(final)}"
            quality += "" if last == "the final exit" else f" {last}"
        if self.plain_macs is not None:
            share = percent(self.mean_macs / self.plain_macs)
            macs += f", {share} of the plain network's {self.plain_macs:,}"
        lines = [(name, quality), ("mean MACs", macs)]
        if self.asked is not None:
            lines.append(("asked", self.asked.in_words(way=way, last=last, of=name)))
        if self.guarantee is not None:
            promise = self.guarantee.sentence("as they were drawn", way=way, last=last)
            lines.append(("promise", promise))
        return lines
