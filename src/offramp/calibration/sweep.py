"""One threshold that steers a whole network, as of gates or of tokens: chosen from a few that ran.

Exits can be judged without running them early: every exit's logits are there. What a block that is
skipped, or a token that is dropped, does to the answer shows only when it is gone, so the network
runs at each threshold.

Shapes: ``K`` thresholds, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offramp.calibration.asked import Asked, cannot_tell
from offramp.calibration.guarantee import Guarantee, check_guarantee
from offramp.calibration.labelled import LabelledLogits
from offramp.calibration.risk import RISKS, cautious_losses, check_risk
from offramp.calibration.search import Floats
from offramp.calibration.sequence import (
    check_disjoint,
    choose_test,
    in_random_order,
    part_samples,
    passing_values,
)
from offramp.calibration.targets import RiskLimit, as_target, budget_too_low, risk_too_low
from offramp.errors import FewSamplesWarning, InvalidArgumentError, ShapeError
from offramp.tables import Lines, Printed, Table, percent, points


@dataclass(frozen=True, kw_only=True)
class Sweep(LabelledLogits):
    """What a network says of every sample at each of several thresholds, and what that costs.

    Attributes:
        logits_KNC: Raw logits, shape (K, N, C), float32, on the CPU.
        labels_N: Classes, shape (N,), int64, on the CPU.
        prior: Share of each class in the population that figures are about, C numbers that sum
            to 1, none negative; None where the samples are drawn from it as they are.
        thresholds: K of them, from the cheapest to the one at which most runs; for gates
            descending to 0, for tokens that halt ascending to 1.
        macs_KN: MACs that ran for each sample, shape (K, N), int64, on the CPU.
        plain_macs: MACs per sample of the plain network.
    """

    thresholds: tuple[float, ...]
    macs_KN: Tensor
    plain_macs: int

    def __post_init__(self) -> None:
        expected = (len(self.thresholds), len(self.labels_N))
        for name, values in (("logits", self.logits_KNC), ("MACs", self.macs_KN)):
            if values.shape[:2] != expected:
                raise ShapeError(
                    f"Expected {name} of {expected[0]} thresholds and {expected[1]} labels. "
                    f"Got shape {tuple(values.shape)}."
                )
        super().__post_init__()

    @property
    def accuracy_K(self) -> Floats:
        """Accuracy at each threshold, shape (K,)."""
        return self._mean_K(self.correct_KN)

    @property
    def mean_macs_K(self) -> Floats:
        """Mean MACs per sample at each threshold, shape (K,)."""
        return self._mean_K(self.macs_KN)

    def take(self, rows: npt.ArrayLike) -> Sweep:
        """Some of the samples: see :meth:`LabelledLogits.take`."""
        rows_N = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        return replace(
            self,
            logits_KNC=self.logits_KNC[:, rows_N],
            labels_N=self.labels_N[rows_N],
            macs_KN=self.macs_KN[:, rows_N],
        )

    def _mean_K(self, values_KN: Tensor) -> Floats:
        mean_K: Floats = np.average(values_KN.double().numpy(), axis=1, weights=self.weights_N)
        return mean_K


@dataclass(frozen=True, kw_only=True, repr=False)
class ChosenThreshold(Printed):
    """A threshold and what it reached on the data that chose it; print it for a table.

    Attributes:
        threshold: For the network's policy.
        accuracy: Adaptive accuracy on the calibration data, a fraction.
        mean_macs: Mean MACs per sample on the calibration data.
        guarantee: What is promised of it; None where nothing is.
        asked: The target that it was chosen for; None where that is not known.
        whole_accuracy: Where most runs, on the calibration data.
        plain_macs: MACs per sample of the plain network.
        num_samples: Calibration samples.
    """

    threshold: float
    accuracy: float
    mean_macs: float
    guarantee: Guarantee | None = None
    asked: Asked | None = field(default=None, compare=False)
    whole_accuracy: float | None = None
    plain_macs: int | None = None
    num_samples: int | None = None

    def _title(self) -> str:
        on = "" if self.num_samples is None else f", on {self.num_samples:,} calibration samples"
        return f"threshold {self.threshold:.4f}{on}"

    def _parts(self) -> list[Table | Lines]:
        accuracy, macs = percent(self.accuracy), f"{self.mean_macs:,.0f}"
        if self.whole_accuracy is not None:
            drop, whole = points(self.whole_accuracy - self.accuracy), percent(self.whole_accuracy)
            accuracy += f", a drop of {drop} from {whole} where most runs"
        if self.plain_macs is not None:
            share = percent(self.mean_macs / self.plain_macs)
            macs += f", {share} of the plain network's {self.plain_macs:,}"
        lines = [("accuracy", accuracy), ("mean MACs", macs)]
        if self.asked is not None:
            lines.append(("asked", self.asked.in_words(way="it", last="where most runs")))
        return [Lines(lines)]

    def _records(self) -> list[dict[str, Any]]:
        names = ("threshold", "accuracy", "mean_macs")
        return [{name: getattr(self, name) for name in names}]


def choose_threshold(
    sweep: Sweep,
    *,
    max_drop: float | None = None,
    max_risk: float | None = None,
    risk: str = "accuracy_gap",
    budget_macs: float | None = None,
    budget_share: float | None = None,
) -> ChosenThreshold:
    """Choose one of the thresholds for an accuracy target or for a budget.

    What is reached holds for the given samples; on other samples of the same kind expect about
    the same, without a guarantee (:func:`choose_threshold_with_guarantee` gives one). Use data
    that neither trained the network nor will judge it.

    Args:
        sweep: What the network says on held-out data.
        max_drop: Spend least while losing at most this much accuracy against the network with
            everything run, a fraction in [0, 1), e.g. 0.01. Always possible.
        max_risk: The same for another risk: spend least while it is at most this.
        risk: What ``max_risk`` bounds: accuracy_gap, disagreement, error or brier_gap.
        budget_macs: Be most accurate at no more than this many mean MACs per sample.
        budget_share: The same, as a share of the plain network's MACs, above 0.
    Returns:
        The threshold with accuracy and mean MACs on this data.
    Raises:
        InvalidArgumentError: If not exactly one target is given, or it is out of range.
        InfeasibleTargetError: If no threshold costs so little, or risks so little, on this data.
    Warns:
        FewSamplesWarning: If so few samples cannot tell whether the target holds.
    """
    chosen = best_threshold(
        sweep,
        risk=risk,
        max_drop=max_drop,
        max_risk=max_risk,
        budget_macs=budget_macs,
        budget_share=budget_share,
    )
    doubt = cannot_tell(chosen.asked, sweep.effective_num_samples)
    if doubt is not None:
        advice = "choose_threshold_with_guarantee(), which says how many a promise takes"
        warnings.warn(f"{doubt}, or use {advice}.", FewSamplesWarning, stacklevel=2)
    return chosen


def best_threshold(sweep: Sweep, *, risk: str = "accuracy_gap", **targets: Any) -> ChosenThreshold:
    """Choose a threshold as :func:`choose_threshold` does, without a word about few samples."""
    _require_sweep(sweep)
    target = as_target(**targets, risk=risk, plain_macs=sweep.plain_macs)
    accuracy_K, mean_macs_K = sweep.accuracy_K, sweep.mean_macs_K
    if isinstance(target, RiskLimit):
        risk_K = np.average(RISKS[target.risk].losses(sweep), axis=1, weights=sweep.weights_N)
        is_allowed_K = risk_K <= target.most + 1e-12
        if not is_allowed_K.any():
            raise risk_too_low(target, lowest=float(risk_K.min()), where="any threshold")
        score_K = -mean_macs_K
    else:
        is_allowed_K = mean_macs_K <= target.macs * (1 + 1e-12)  # a mean is rounded
        if not is_allowed_K.any():
            raise budget_too_low(target.macs, cheapest_macs=float(mean_macs_K.min()))
        # A trace of cost prefers the cheaper of equally accurate thresholds.
        score_K = accuracy_K - 1e-9 * mean_macs_K / sweep.plain_macs
    chosen = _chosen(sweep, int(np.where(is_allowed_K, score_K, -np.inf).argmax()))
    return replace(chosen, asked=Asked.of(len(sweep.labels_N), risk=risk, **targets))


def _require_sweep(given: object) -> None:
    if not isinstance(given, Sweep):
        raise InvalidArgumentError(
            "Expected what a network says at several thresholds, as collect_sweep(network, data) "
            f"returns it. Got {type(given).__name__}: of exits, calibrate chooses the thresholds."
        )


def choose_threshold_with_guarantee(
    sweep: Sweep,
    *,
    max_risk: float,
    risk: str = "accuracy_gap",
    guarantee: float | str = 0.95,
    finding: Sweep | None = None,
    seed: int = 0,
) -> ChosenThreshold:
    """Choose the threshold so that the true risk is within a target, with a stated probability.

    Thresholds are tested one after the other, from where everything runs on, each at the full
    level, until the first fails: the last that passed is chosen. Their order is known before any
    sample is seen, so that all samples test, unless the test sizes its bets on some of them. What
    the promise is about, and when it breaks: see :func:`~offramp.calibrate_with_guarantee`.

    Args:
        sweep: What the network says on held-out data, at thresholds that were not chosen on it.
        max_risk: The target, a fraction in (0, 1), e.g. 0.01.
        risk: As for :func:`~offramp.calibrate_with_guarantee`.
        guarantee: As for :func:`~offramp.calibrate_with_guarantee`.
        finding: What the network says of other samples at the same thresholds, which size the
            bets where the test makes any, so that all of ``sweep`` tests. If None, three in ten
            of ``sweep`` size them.
        seed: Parts the samples where bets are to be sized; also draws the order in which samples
            are bet on. The labels in their order take part in the draw, the logits never do.
    Returns:
        The threshold, what it reached on all samples, and the promise.
    Raises:
        InvalidArgumentError: If an argument is out of range, a promise on average is asked for
            with a prior that weights samples unevenly, or ``finding`` has other thresholds.
        DataError: If ``finding`` holds samples that test.
        InSampleError: If some of the samples chose the network's checkpoint.
        InfeasibleTargetError: If not even running everything passes; says how many samples would
            do, and carries the lowest target that these would allow.
    """
    check_risk(risk, max_risk)
    check_guarantee(max_risk, guarantee)
    _require_sweep(sweep)
    sweep.require_independent()
    testing = sweep
    test = choose_test(risk, testing, guarantee=guarantee)
    found_KN = np.empty((len(sweep.thresholds), 0))
    if finding is not None:
        _check_same_thresholds(finding, sweep)
        check_disjoint(finding, sweep)
    if test.needs_finding:
        if finding is None:
            finding, testing = part_samples(sweep, seed)
            test = choose_test(risk, testing, guarantee=guarantee)
        else:
            testing = sweep.take(in_random_order(sweep, seed))
        found_KN = _losses(finding, risk)
    safest_first = zip(found_KN[::-1], _losses(testing, risk)[::-1], strict=True)
    passed = passing_values(test, safest_first, max_risk, num_samples=len(sweep.labels_N))
    promise = Guarantee(
        risk=risk,
        max_risk=max_risk,
        probability=None if isinstance(guarantee, str) else guarantee,
        method=test.method,
        value=passed[-1],
        num_samples=len(sweep.labels_N),
        num_tested=len(testing.labels_N),
        num_finding=found_KN.shape[1],
        effective_num_samples=testing.effective_num_samples,
        num_candidates=len(sweep.thresholds),
        num_passed=len(passed),
    )
    return replace(_chosen(sweep, -len(passed)), guarantee=promise)


def _check_same_thresholds(finding: Sweep, testing: Sweep) -> None:
    if finding.thresholds != testing.thresholds:
        raise InvalidArgumentError(
            "Expected 'finding' at the thresholds of the other samples. "
            f"Got {finding.thresholds} against {testing.thresholds}."
        )


def _losses(sweep: Sweep, risk: str) -> Floats:
    """Loss of every sample at each threshold, weights multiplied in, shape (K, N)."""
    losses_KN: Floats = cautious_losses(risk, sweep) * sweep.weights_N
    return losses_KN


def _chosen(sweep: Sweep, k: int) -> ChosenThreshold:
    return ChosenThreshold(
        threshold=sweep.thresholds[k],
        accuracy=float(sweep.accuracy_K[k]),
        mean_macs=float(sweep.mean_macs_K[k]),
        whole_accuracy=float(sweep.accuracy_K[-1]),
        plain_macs=sweep.plain_macs,
        num_samples=len(sweep.labels_N),
    )
