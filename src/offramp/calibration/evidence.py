"""Evidence: what is known of held-out samples, and the one way of choosing a policy by it.

Whatever a policy decides (at which exit a sample leaves, which blocks run, when a token halts), it
is chosen for a target, promised, and followed along a curve in the same way. Evidence of each kind
says which policies there are, what they reach on its samples, and which is the best.

Shapes: ``N`` samples.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic

from typing_extensions import Self

from offramp.calibration.asked import IN_PYTHON, Asked, cannot_tell
from offramp.calibration.chosen import Calibration, ExitAlone, P
from offramp.calibration.labelled import LabelledLogits
from offramp.calibration.rules import Rule
from offramp.calibration.search import Floats
from offramp.calibration.targets import Budget, RiskLimit, as_target
from offramp.errors import FewSamplesWarning, InvalidArgumentError
from offramp.policy.as_dict import without_inf
from offramp.runtime.chosen_on import Front, FrontPoint


@dataclass(frozen=True, kw_only=True)
class Evidence(LabelledLogits, ABC, Generic[P]):
    """Knowledge of held-out samples: every way of answering them, and its cost.

    Attributes:
        plain_macs: MACs per sample of the plain network.
    """

    drop_risk: ClassVar[str] = "accuracy_gap"
    """The risk that ``max_drop`` limits."""

    has_fixed_candidates: ClassVar[bool] = False
    """True if :meth:`safest_first` is known before any sample is seen: then all may test."""

    plain_macs: int = field(init=False)

    @abstractmethod
    def policies(self, rule: Rule | None) -> tuple[P, ...]:
        """Policies that a rule stands for, one at least, of which the best is to be chosen."""

    @abstractmethod
    def best(
        self, target: Budget | RiskLimit, policies: Sequence[P], *, off: frozenset[int]
    ) -> Calibration[P]:
        """Choose the cheapest policy within a risk, or the most accurate within a budget."""

    @abstractmethod
    def measure(self, policy: P) -> Calibration[P]:
        """Measure what a policy reaches on these samples."""

    def measure_each(self, policies: Sequence[P]) -> Iterator[Calibration[P]]:
        """Measure what each of several policies reaches on these samples."""
        yield from map(self.measure, policies)

    @abstractmethod
    def safest_first(self, policies: Sequence[P], limit: RiskLimit) -> Sequence[P]:
        """List candidates of a promise in the order in which other samples test them."""

    @abstractmethod
    def losses(self, policies: Sequence[P], risk: str) -> Iterator[Floats]:
        """Yield the loss of every sample under each policy, weights multiplied in, shape (N,)."""

    @abstractmethod
    def least_macs(self, policies: Sequence[P]) -> float:
        """Mean MACs of the smallest budget that one of the policies can keep."""

    @abstractmethod
    def alone(self) -> tuple[ExitAlone, ...]:
        """Measure the network cut off at each exit."""

    def doubt(self, asked: Asked | None) -> str | None:
        """Say why so few samples cannot tell what was asked for; None where they can."""
        return cannot_tell(asked, self.effective_num_samples)

    @abstractmethod
    def _check_same_network(self, other: Self) -> None: ...

    def check_same_network(self, other: Self) -> None:
        """Raise InvalidArgumentError if other evidence is of another network."""
        if not isinstance(other, type(self)):
            raise InvalidArgumentError(
                f"Expected evidence of one kind. Got {type(self).__name__} against "
                f"{type(other).__name__}: collect both from the same network."
            )
        self._check_same_network(other)


def ordered_front(evidence: Evidence[P], chosen: Calibration[P], risk: RiskLimit) -> Front:
    """Put the policies around a chosen one in order, with what each reaches on the samples.

    Those that stood to be tested, where something is promised; else those that would.
    """
    candidates: Sequence[P] = chosen.candidates
    if not candidates:
        fixed = evidence.has_fixed_candidates
        policies = evidence.policies(None) if fixed else (chosen.policy,)
        candidates = evidence.safest_first(policies, risk)
    each = zip(
        evidence.measure_each(candidates), evidence.losses(candidates, risk.risk), strict=True
    )
    return Front(
        risk=risk.risk,
        passed=None if chosen.guarantee is None else chosen.guarantee.num_passed,
        points=tuple(
            FrontPoint(
                thresholds=tuple(without_inf(reached.policy.thresholds)),
                risk=float(losses_N.mean()),
                mean_macs=reached.mean_macs,
                accuracy=reached.accuracy,
                mean_iou=reached.mean_iou,
            )
            for reached, losses_N in each
        ),
    )


def calibrate(
    logits: Evidence[P],
    *,
    max_drop: float | None = None,
    max_risk: float | None = None,
    risk: str = "accuracy_gap",
    budget_macs: float | None = None,
    budget_share: float | None = None,
    rule: Rule | None = None,
    off: frozenset[int] = frozenset(),
) -> Calibration[P]:
    """Choose thresholds for an accuracy target or for a budget.

    What is reached holds for the given samples; on other samples of the same kind expect about
    the same, without a guarantee (:func:`~offramp.calibrate_with_guarantee` gives one). Use data
    that neither trained the network nor will judge it.

    Args:
        logits: Every exit's logits on held-out data, or a sweep over the thresholds of gates or
            tokens.
        max_drop: Spend least while losing at most this much accuracy against the final exit, or
            against the network where most runs, a fraction in [0, 1), e.g. 0.01. Always possible:
            every exit can be switched off. Where every pixel has a class, so much mean IoU.
        max_risk: The same for another risk: spend least while it is at most this.
        risk: What ``max_risk`` bounds: accuracy_gap, disagreement, error or brier_gap; where
            every pixel has a class, pixel_error_gap.
        budget_macs: Be most accurate at no more than this many mean MACs per sample; thresholds of
            exits are compared by how likely their answers are right, which is less noisy.
        budget_share: The same, as a share of the plain network's MACs, above 0.
        rule: Confidence function: entropy (the default), max_probability or margin; where every
            pixel has a class, pixel_share (the default, whose threshold for pixels is chosen too),
            mean_max_probability, mean_entropy, low_quantile or agreement. Or a policy, of which
            all but the thresholds is kept; or a function that makes one from the samples, or
            several, of which the best is chosen. Only of exits.
        off: Exits to switch off whatever they could do.
    Returns:
        The policy with accuracy and mean MACs on this data; print it for a table.
    Raises:
        InvalidArgumentError: If not exactly one target is given, or it is out of range.
        InfeasibleTargetError: If no thresholds cost so little, or risk so little, on this data.
    Warns:
        FewSamplesWarning: If so few samples cannot tell whether the target holds.
    """
    chosen = choose_policy(
        logits,
        rule=rule,
        off=off,
        risk=risk,
        max_drop=max_drop,
        max_risk=max_risk,
        budget_macs=budget_macs,
        budget_share=budget_share,
    )
    if doubt := logits.doubt(chosen.asked):
        warnings.warn(f"{doubt}, or use {IN_PYTHON}.", FewSamplesWarning, stacklevel=2)
    return chosen


def choose_policy(
    logits: Evidence[P],
    *,
    rule: Rule | None = None,
    off: frozenset[int] = frozenset(),
    risk: str = "accuracy_gap",
    **targets: Any,
) -> Calibration[P]:
    """Choose a policy as :func:`calibrate` does, without a word about few samples."""
    require_evidence(logits)
    target = as_target(**targets, risk=risk, plain_macs=logits.plain_macs, drop=logits.drop_risk)
    best = logits.best(target, logits.policies(rule), off=off)
    ((name, limit),) = ((name, x) for name, x in targets.items() if x is not None)
    asked = Asked(
        target=name,
        limit=float(limit),
        num_samples=len(logits.labels_N),
        risk=risk if name == "max_risk" else None,
    )
    return replace(best, asked=asked)


def require_evidence(*given: object) -> None:
    """Raise InvalidArgumentError if something has not been collected yet, such as a network."""
    for each in given:
        if not isinstance(each, Evidence):
            raise InvalidArgumentError(
                "Expected every exit's logits on held-out samples, as collect(network, data) "
                f"returns them. Got a {type(each).__name__}."
            )
