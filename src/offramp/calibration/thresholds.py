"""Choosing one threshold per exit on held-out data.

The thresholds are searched jointly. For fixed thresholds elsewhere, every possible threshold of
one exit is scored at once: its samples are sorted by confidence, and running sums give accuracy
and cost of letting the surest j leave. Rounds of this over the exits climb a price for compute
(accuracy minus price times cost); a sweep over prices walks along the trade-off, and the best
point that meets the target is kept.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes, ``J`` candidate thresholds of one exit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F

from offramp.calibration.collect import ExitLogits
from offramp.errors import InfeasibleTargetError, InvalidArgumentError
from offramp.measure.cost import ExitCosts
from offramp.policy.confidence import CONFIDENCE_RULES
from offramp.policy.policies import ThresholdPolicy

Floats = npt.NDArray[np.float64]
Score = Callable[[Floats, Floats], Floats]
"""From accuracies and mean MACs of candidates to how good each is; -inf where not allowed."""

_PRICES = np.geomspace(1e-3, 3.0, 24)
"""Accuracy that a plain network's worth of MACs is worth, from cheap to dear."""

_TEMPERATURES = np.geomspace(0.05, 5.0, 60)
"""Tried on the final exit's logits, from very sure to very unsure."""

_MAX_ROUNDS = 8
"""Rounds over the exits for one price; most settle in three."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A policy and what it reached on the data that chose it.

    Attributes:
        policy: The thresholds.
        accuracy: Adaptive accuracy on the calibration data, a fraction.
        mean_macs: Mean MACs per sample on the calibration data.
    """

    policy: ThresholdPolicy
    accuracy: float
    mean_macs: float


def calibrate(
    logits: ExitLogits,
    *,
    max_drop: float | None = None,
    budget_macs: float | None = None,
    rule: str = "entropy",
    off: frozenset[int] = frozenset(),
) -> Calibration:
    """Choose thresholds for an accuracy target or for a budget.

    What is reached holds for the given samples; on other samples of the same kind expect about
    the same, without a guarantee. Use data that neither trained the network nor will judge it.

    Args:
        logits: Every exit's logits on held-out data.
        max_drop: Spend least while losing at most this much accuracy against the final exit, a
            fraction in [0, 1), e.g. 0.01. Always possible: every exit can be switched off.
        budget_macs: Be most accurate at no more than this many mean MACs per sample; candidates
            are compared by :func:`expected_correctness`.
        rule: Confidence function: entropy, max_probability or margin.
        off: Exits to switch off whatever they could do.
    Returns:
        The policy with accuracy and mean MACs on this data.
    Raises:
        InvalidArgumentError: If not exactly one target is given, or it is out of range.
        InfeasibleTargetError: If no thresholds cost so little on this data.
    """
    if (max_drop is None) == (budget_macs is None):
        raise InvalidArgumentError("Give exactly one target: 'max_drop' or 'budget_macs'.")
    confidence_KN = confidences(logits, rule)
    if not off <= set(range(len(confidence_KN) - 1)):
        raise InvalidArgumentError(
            f"The 'off' parameter must hold exits in [0, {len(confidence_KN) - 2}], the final one "
            f"never. Got {sorted(off)}."
        )
    correct_KN = logits.correct_KN.numpy().astype(np.float64)
    worth_KN = correct_KN
    if budget_macs is not None:
        if budget_macs == math.inf:
            raise InvalidArgumentError(
                "The 'budget_macs' parameter must be finite. Got inf: for the most accurate "
                "thresholds, give the plain network's MACs."
            )
        score = _within_budget(budget_macs, plain_macs=logits.costs.plain_macs)
        worth_KN = expected_correctness(logits)
    else:
        assert max_drop is not None  # exactly one is given
        score = _within_drop(max_drop, final_accuracy=float(correct_KN[-1].mean()))
    search = _Search(confidence_KN, worth_KN, logits.costs, score, off=off)
    thresholds = search.run()
    if search.best_score == -math.inf:
        raise InfeasibleTargetError(
            f"The 'budget_macs' parameter must be at least {search.cheapest_macs:,.0f}, the "
            f"cheapest there is on these samples. Got {budget_macs:,.0f}.",
            best_achievable=search.cheapest_macs,
        )
    accuracy, mean_macs = evaluate_thresholds(confidence_KN, correct_KN, logits.costs, thresholds)
    return Calibration(
        policy=ThresholdPolicy(thresholds, rule=rule), accuracy=accuracy, mean_macs=mean_macs
    )


def expected_correctness(logits: ExitLogits) -> Floats:
    """How likely each exit is right about each sample, with less noise than right or wrong.

    The final exit's probability of the class that an exit predicts, at the temperature that fits
    the labels best, plus a constant per exit that makes its mean the exit's measured accuracy.
    Thresholds that are compared by it differ by what they do to all samples that change exits,
    not by the luck of the few whose answers change from wrong to right.

    Args:
        logits: Every exit's logits on held-out data.
    Returns:
        Shape (K, N); about in [0, 1], since the constants may lead a little beyond. Right or wrong
        stands in where the final exit's logits are NaN.
    """
    correct_KN = logits.correct_KN.numpy().astype(np.float64)
    final_NC = logits.logits_KNC[-1].double()
    losses = [
        float(F.cross_entropy(final_NC / t, logits.labels_N).nan_to_num(math.inf))
        for t in _TEMPERATURES
    ]
    p_NC = (final_NC / _TEMPERATURES[int(np.argmin(losses))]).softmax(-1)
    predicted_KN = logits.logits_KNC.argmax(-1)
    expected_KN = p_NC.gather(1, predicted_KN.T).T.numpy()
    expected_KN = np.where(np.isnan(expected_KN), correct_KN, expected_KN)
    offset_K1 = (correct_KN - expected_KN).mean(axis=1, keepdims=True)
    shifted: Floats = expected_KN + offset_K1
    return shifted


def evaluate_thresholds(
    confidence_KN: Floats,
    correct_KN: Floats,
    costs: ExitCosts,
    thresholds: tuple[float, ...],
) -> tuple[float, float]:
    """Accuracy and mean MACs of given thresholds on collected samples.

    Args:
        confidence_KN: Confidence of each exit, shape (K, N).
        correct_KN: Whether each exit is right, or how likely, shape (K, N).
        costs: MACs of stages and heads.
        thresholds: K - 1 thresholds; the head of an exit at +inf does not run.
    Returns:
        Adaptive accuracy and mean MACs per sample.
    """
    off = frozenset(k for k, threshold in enumerate(thresholds) if threshold == math.inf)
    exit_N = exits_left_by(confidence_KN, thresholds)
    correct_N = correct_KN[exit_N, np.arange(len(exit_N))]
    macs_K = np.asarray(costs.exit_macs(off), dtype=np.float64)
    return float(correct_N.mean()), float(macs_K[exit_N].mean())


def exits_left_by(confidence_KN: Floats, thresholds: Sequence[float]) -> npt.NDArray[np.int64]:
    """The exit that each sample leaves by.

    Args:
        confidence_KN: Confidence of each exit, shape (K, N).
        thresholds: K - 1 thresholds; +inf and NaN confidence let nobody go.
    Returns:
        Exit numbers, shape (N,), int64.
    """
    num_exits, num_samples = confidence_KN.shape
    exit_N = np.full(num_samples, num_exits - 1)
    for k in reversed(range(num_exits - 1)):
        exit_N[confidence_KN[k] >= thresholds[k]] = k
    return exit_N


def confidences(logits: ExitLogits, rule: str) -> Floats:
    """Confidence of every exit about every sample.

    Args:
        logits: Every exit's logits.
        rule: Confidence function: entropy, max_probability or margin.
    Returns:
        Shape (K, N), float64; NaN where the logits are.
    Raises:
        InvalidArgumentError: If the rule is unknown.
    """
    if rule not in CONFIDENCE_RULES:
        raise InvalidArgumentError(
            f"The rule must be one of {', '.join(CONFIDENCE_RULES)}. Got {rule!r}."
        )
    rows = [CONFIDENCE_RULES[rule](logits_NC).numpy() for logits_NC in logits.logits_KNC]
    return np.stack(rows).astype(np.float64)


def _within_budget(budget_macs: float, *, plain_macs: int) -> Score:
    # A trace of cost in the score prefers the cheaper of equally accurate candidates.
    return lambda accuracy_J, macs_J: np.where(
        macs_J <= budget_macs, accuracy_J - 1e-9 * macs_J / plain_macs, -np.inf
    )


def check_max_drop(max_drop: float) -> None:
    """Refuse an accuracy target that is no fraction.

    Args:
        max_drop: As for :func:`calibrate`.
    Raises:
        InvalidArgumentError: If it is not in [0, 1).
    """
    if not 0 <= max_drop < 1:
        raise InvalidArgumentError(f"The 'max_drop' parameter must be in [0, 1). Got {max_drop}.")


def _within_drop(max_drop: float, *, final_accuracy: float) -> Score:
    check_max_drop(max_drop)
    floor = final_accuracy - max_drop - 1e-12
    return lambda accuracy_J, macs_J: np.where(accuracy_J >= floor, -macs_J, -np.inf)


class _Search:
    """Coordinate search over one threshold per exit; remembers the best point it has seen."""

    def __init__(
        self,
        confidence_KN: Floats,
        correct_KN: Floats,
        costs: ExitCosts,
        score: Score,
        *,
        off: frozenset[int],
    ) -> None:
        # NaN sorts and compares as less sure than anything.
        self.confidence_KN = np.nan_to_num(confidence_KN, nan=-1.0)
        self.correct_KN = correct_KN
        self.costs = costs
        self.score = score
        self.num_exits, self.num_samples = correct_KN.shape
        self.searched = [k for k in range(self.num_exits - 1) if k not in off]
        self.order_KN = np.argsort(-self.confidence_KN, axis=1, kind="stable")
        # The first point: nobody leaves early.
        self.best = [math.inf] * (self.num_exits - 1)
        accuracy, self.cheapest_macs = evaluate_thresholds(
            self.confidence_KN, correct_KN, costs, tuple(self.best)
        )
        self.best_score = float(score(np.array(accuracy), np.array(self.cheapest_macs)))

    def run(self) -> tuple[float, ...]:
        """Sweep the prices both ways, then climb the target itself from the best point."""
        for prices, start in ((_PRICES, math.inf), (_PRICES[::-1], 0.0)):
            thresholds = [math.inf] * (self.num_exits - 1)
            for k in self.searched:
                thresholds[k] = start
            for price in prices:
                self._climb(thresholds, self._at_price(price))
        self._climb(list(self.best), self.score)
        return tuple(self.best)

    def _at_price(self, price: float) -> Score:
        plain_macs = self.costs.plain_macs
        return lambda accuracy_J, macs_J: accuracy_J - price * macs_J / plain_macs

    def _climb(self, thresholds: list[float], objective: Score) -> None:
        """Improve ``thresholds`` in place, an exit at a time, until none changes."""
        for _ in range(_MAX_ROUNDS):
            before = list(thresholds)
            for k in self.searched:
                candidates_J, accuracy_J, macs_J = self._scan(k, thresholds)
                self.cheapest_macs = min(self.cheapest_macs, float(macs_J.min()))
                self._remember(k, thresholds, candidates_J, self.score(accuracy_J, macs_J))
                values_J = objective(accuracy_J, macs_J)
                if np.isfinite(values_J).any():
                    thresholds[k] = float(candidates_J[values_J.argmax()])
            if thresholds == before:
                return

    def _remember(
        self, k: int, thresholds: list[float], candidates_J: Floats, scores_J: Floats
    ) -> None:
        j = int(scores_J.argmax())
        if scores_J[j] > self.best_score:
            self.best_score = float(scores_J[j])
            self.best = [*thresholds[:k], float(candidates_J[j]), *thresholds[k + 1 :]]

    def _scan(self, k: int, thresholds: list[float]) -> tuple[Floats, Floats, Floats]:
        """Accuracy and mean MACs for every threshold of exit k, the others held fixed."""
        others_off = {j for j, t in enumerate(thresholds) if t == math.inf} - {k}
        exit_macs = self.costs.exit_macs(frozenset(others_off))
        without_k = [*thresholds[:k], math.inf, *thresholds[k + 1 :]]
        exit_N = exits_left_by(self.confidence_KN, without_k)
        all_samples = np.arange(self.num_samples)
        correct_N = self.correct_KN[exit_N, all_samples]
        macs_N = np.asarray(exit_macs, dtype=np.float64)[exit_N]

        order = self.order_KN[k]
        order = order[exit_N[order] > k]  # whoever reaches exit k, surest first
        gain = np.cumsum(self.correct_KN[k][order] - correct_N[order])
        saving = np.cumsum(exit_macs[k] - macs_N[order])
        sorted_confidence = self.confidence_KN[k][order]
        # A cut is possible where the confidence changes, and after everyone who is not NaN.
        following = np.append(sorted_confidence[1:], -1.0)
        ends = np.flatnonzero((sorted_confidence > following) & (sorted_confidence >= 0))
        surest_left, next_sure = sorted_confidence[ends], following[ends]
        # Halfway, unless float32, which confidences are, has no number in between.
        cuts = ((surest_left + next_sure) / 2).astype(np.float32).astype(np.float64)
        cuts = np.where(cuts > next_sure, cuts, surest_left)
        cuts[next_sure < 0] = 0.0
        off_macs = macs_N.sum() - self.costs.head_macs[k] * len(order)
        accuracy_J = (correct_N.sum() + np.append(0.0, gain[ends])) / self.num_samples
        macs_J = np.append(off_macs, macs_N.sum() + saving[ends]) / self.num_samples
        return np.append(math.inf, cuts), accuracy_J, macs_J
