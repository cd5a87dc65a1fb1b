"""Choosing one threshold per exit on held-out data, for a target or a budget.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from offramp.calibration.collect import ExitLogits
from offramp.calibration.risk import RISKS
from offramp.calibration.search import Floats, Score, ThresholdSearch, evaluate_thresholds
from offramp.calibration.targets import RiskLimit, as_target, budget_too_low, risk_too_low
from offramp.calibration.temperature import BoolArray, fit_temperature, reached
from offramp.errors import InvalidArgumentError
from offramp.measure.cost import ExitCosts
from offramp.policy.policies import Setting, State, ThresholdedPolicy, never_leave

Rule = str | ThresholdedPolicy | Callable[[ExitLogits], ThresholdedPolicy]
"""The name of a confidence function, a policy, or a function that makes one from samples."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A policy and what it reached on the data that chose it.

    Attributes:
        policy: The policy with its thresholds.
        accuracy: Adaptive accuracy on the calibration data, a fraction.
        mean_macs: Mean MACs per sample on the calibration data.
    """

    policy: ThresholdedPolicy
    accuracy: float
    mean_macs: float


def calibrate(
    logits: ExitLogits,
    *,
    max_drop: float | None = None,
    max_risk: float | None = None,
    risk: str = "accuracy_gap",
    budget_macs: float | None = None,
    budget_share: float | None = None,
    rule: Rule = "entropy",
    off: frozenset[int] = frozenset(),
) -> Calibration:
    """Choose thresholds for an accuracy target or for a budget.

    What is reached holds for the given samples; on other samples of the same kind expect about
    the same, without a guarantee (:func:`~offramp.calibrate_with_guarantee` gives one). Use data
    that neither trained the network nor will judge it.

    Args:
        logits: Every exit's logits on held-out data.
        max_drop: Spend least while losing at most this much accuracy against the final exit, a
            fraction in [0, 1), e.g. 0.01. Always possible: every exit can be switched off.
        max_risk: The same for another risk: spend least while it is at most this.
        risk: What ``max_risk`` bounds: accuracy_gap, disagreement, error or brier_gap.
        budget_macs: Be most accurate at no more than this many mean MACs per sample; candidates
            are compared by :func:`expected_correctness`.
        budget_share: The same, as a share of the plain network's MACs, above 0.
        rule: Confidence function: entropy, max_probability or margin; or a policy, of which all
            but the thresholds is kept; or a function that makes one from the samples.
        off: Exits to switch off whatever they could do.
    Returns:
        The policy with accuracy and mean MACs on this data.
    Raises:
        InvalidArgumentError: If not exactly one target is given, or it is out of range.
        InfeasibleTargetError: If no thresholds cost so little, or risk so little, on this data.
    """
    target = as_target(
        max_drop=max_drop,
        max_risk=max_risk,
        risk=risk,
        budget_macs=budget_macs,
        budget_share=budget_share,
        plain_macs=logits.costs.plain_macs,
    )
    policy = policy_like(rule, logits)
    _check_off(off, num_exits=policy.num_exits)
    if isinstance(target, RiskLimit):
        return _within_risk(logits, policy, target, off=off)
    worth_KN, costs = expected_correctness(logits), costs_under(logits, policy)
    return calibrate_within(logits, policy, target.macs, worth_KN=worth_KN, costs=costs, off=off)


def _check_off(off: frozenset[int], *, num_exits: int) -> None:
    if not off <= set(range(num_exits - 1)):
        raise InvalidArgumentError(
            f"The 'off' parameter must hold exits in [0, {num_exits - 2}], the final one never. "
            f"Got {sorted(off)}."
        )


def policy_like(rule: Rule, logits: ExitLogits) -> ThresholdedPolicy:
    """The policy whose thresholds are to be chosen.

    Args:
        rule: As for :func:`calibrate`.
        logits: Every exit's logits.
    Returns:
        A policy; its own thresholds do not matter.
    Raises:
        InvalidArgumentError: If there is no such confidence function, or the policy is for another
            number of exits.
    """
    num_exits = logits.costs.num_exits
    if isinstance(rule, str):
        return replace(never_leave(num_exits), rule=rule)
    policy = rule if isinstance(rule, ThresholdedPolicy) else rule(logits)
    if policy.num_exits != num_exits:
        raise InvalidArgumentError(
            f"Expected a policy for {num_exits} exits. Got one for {policy.num_exits}."
        )
    return policy


def confidences(
    logits: ExitLogits, policy: ThresholdedPolicy, off: frozenset[int] = frozenset()
) -> Floats:
    """Confidence of every exit about every sample, nobody leaving.

    Args:
        logits: Every exit's logits.
        policy: Says how sure an exit is, and who may leave.
        off: Exits whose heads do not run, so that the policy never hears of them.
    Returns:
        Shape (K, N), float64; NaN where a sample may not leave, where the logits are NaN and at
        exits that are off.
    """
    confidence_KN = np.full(logits.logits_KNC.shape[:2], np.nan)
    state: State = ()
    for k, logits_NC in enumerate(logits.logits_KNC):
        if k not in off:
            lowest = Setting(policy.setting(k).temperature, 0.0)
            may_leave_N, confidence_N, state = policy.decide(k, logits_NC, state, lowest)
            confidence_KN[k] = confidence_N.masked_fill(~may_leave_N, math.nan).double().numpy()
    return confidence_KN


def reached_under(logits: ExitLogits, policy: ThresholdedPolicy) -> BoolArray:
    """Which samples reach each exit under a policy.

    Args:
        logits: Every exit's logits.
        policy: The policy.
    Returns:
        Shape (K, N), bool.
    """
    return reached(confidences(logits, policy, policy.off_exits), policy.thresholds)


def costs_under(logits: ExitLogits, policy: ThresholdedPolicy) -> ExitCosts:
    """What stages and exits cost with the decisions of a policy.

    Args:
        logits: Every exit's logits.
        policy: The policy; its thresholds do not matter.
    Returns:
        MACs, those of deciding counted to the heads.
    """
    return logits.costs.with_decisions(policy.decision_macs)


def search_for(
    logits: ExitLogits,
    policy: ThresholdedPolicy,
    worth_KN: Floats,
    confidence_KN: Floats,
    *,
    costs: ExitCosts,
    off: frozenset[int] = frozenset(),
) -> ThresholdSearch:
    """A search over thresholds that keeps to what a policy can do.

    Args:
        logits: Every exit's logits.
        policy: The policy; its thresholds do not matter.
        worth_KN: How good it is that a sample leaves by an exit, shape (K, N).
        confidence_KN: What :func:`confidences` says with these exits off.
        costs: Of each stage, and of each exit with its decision.
        off: Exits that stay off.
    Returns:
        The search.
    """
    return ThresholdSearch(
        confidence_KN,
        worth_KN,
        costs,
        weights_N=logits.weights_N,
        off=off,
        may_switch_off=not policy.needs_every_exit,
    )


def search_thresholds(
    logits: ExitLogits,
    policy: ThresholdedPolicy,
    worth_KN: Floats,
    score: Score,
    *,
    costs: ExitCosts,
    off: frozenset[int] = frozenset(),
) -> tuple[ThresholdedPolicy, float, float]:
    """Search the thresholds of a policy, which may remember earlier exits.

    What it remembers changes when an exit is switched off; so confidences are then taken anew, and
    that exit stays off.

    Args:
        logits: Every exit's logits.
        policy: The policy; its thresholds do not matter.
        worth_KN: How good it is that a sample leaves by an exit, shape (K, N).
        score: How good a point is.
        costs: Of each stage, and of each exit with its decision.
        off: Exits that stay off.
    Returns:
        The policy with thresholds; their score, -inf where nothing is allowed; the least mean MACs
        that were seen.
    """
    confidence_KN = confidences(logits, policy, off)
    while True:
        search = search_for(logits, policy, worth_KN, confidence_KN, costs=costs, off=off)
        thresholds, best_score = search.best(score)
        found = policy.with_thresholds(thresholds)
        off = found.off_exits
        on = [k for k in range(found.num_exits) if k not in off]
        anew_KN = confidences(logits, policy, off)
        if np.array_equal(anew_KN[on], confidence_KN[on], equal_nan=True):
            return found, best_score, search.cheapest_macs
        confidence_KN = anew_KN


def measure_policy(logits: ExitLogits, policy: ThresholdedPolicy) -> Calibration:
    """What a policy reaches on given samples.

    Args:
        logits: Every exit's logits.
        policy: The policy.
    Returns:
        It, with its accuracy and mean MACs.
    """
    confidence_KN = confidences(logits, policy, policy.off_exits)
    correct_KN = logits.correct_KN.numpy().astype(np.float64)
    accuracy, mean_macs = evaluate_thresholds(
        confidence_KN,
        correct_KN,
        costs_under(logits, policy),
        policy.thresholds,
        logits.weights_N,
    )
    return Calibration(policy=policy, accuracy=accuracy, mean_macs=mean_macs)


def _within_risk(
    logits: ExitLogits,
    policy: ThresholdedPolicy,
    limit: RiskLimit,
    *,
    off: frozenset[int],
) -> Calibration:
    losses_KN = RISKS[limit.risk].losses(logits)
    floor = -limit.most - 1e-12
    found, best_score, _ = search_thresholds(
        logits,
        policy,
        -losses_KN,
        lambda worth_J, macs_J: np.where(worth_J >= floor, -macs_J, -np.inf),
        costs=costs_under(logits, policy),
        off=off,
    )
    if best_score == -math.inf:
        lowest = float(np.average(losses_KN, axis=1, weights=logits.weights_N).min())
        raise risk_too_low(limit, lowest=lowest, where="any exit")
    return measure_policy(logits, found)


def calibrate_within(
    logits: ExitLogits,
    policy: ThresholdedPolicy,
    budget: float,
    *,
    worth_KN: Floats,
    costs: ExitCosts,
    off: frozenset[int] = frozenset(),
) -> Calibration:
    """The most accurate thresholds within a budget, in the unit of given costs.

    Args:
        logits: Every exit's logits on held-out data.
        policy: The policy; its thresholds do not matter.
        budget: Mean cost per sample.
        worth_KN: What :func:`expected_correctness` says.
        costs: Of each stage, and of each exit with its decision: MACs, or something else.
        off: Exits that stay off.
    Returns:
        The policy with accuracy and mean MACs on this data.
    Raises:
        InfeasibleTargetError: If no thresholds cost so little on this data.
    """
    allowed = budget * (1 + 1e-12)  # a weighted mean may be off by its rounding

    # A trace of cost in the score prefers the cheaper of equally accurate candidates.
    def score(worth_J: Floats, cost_J: Floats) -> Floats:
        return np.where(cost_J <= allowed, worth_J - 1e-9 * cost_J / costs.plain_macs, -np.inf)

    found, best_score, cheapest = search_thresholds(
        logits, policy, worth_KN, score, costs=costs, off=off
    )
    if best_score == -math.inf:
        raise budget_too_low(budget, cheapest_macs=cheapest)
    return measure_policy(logits, found)


def expected_correctness(logits: ExitLogits) -> Floats:
    """How likely each exit is right about each sample, with less noise than right or wrong.

    :func:`plausibility`, plus a constant per exit that makes its mean the exit's measured accuracy.
    Thresholds that are compared by it differ by what they do to all samples that change exits,
    not by the luck of the few whose answers change from wrong to right.

    Args:
        logits: Every exit's logits on held-out data.
    Returns:
        Shape (K, N); about in [0, 1], since the constants may lead a little beyond.
    """
    correct_KN = logits.correct_KN.numpy().astype(np.float64)
    expected_KN = plausibility(logits)
    offset_K = np.average(correct_KN - expected_KN, axis=1, weights=logits.weights_N)
    shifted: Floats = expected_KN + offset_K[:, None]
    return shifted


def plausibility(logits: ExitLogits) -> Floats:
    """How likely the final exit finds what each exit says of each sample.

    Its probability of the class that an exit predicts, at the temperature that fits the labels
    best. No exit is more plausible than the final one.

    Args:
        logits: Every exit's logits on held-out data.
    Returns:
        Shape (K, N), in [0, 1]. Right or wrong stands in where the final exit's logits are NaN.
    """
    final_NC = logits.logits_KNC[-1].double()
    p_NC = (final_NC / fit_temperature(logits, -1)).softmax(-1)
    p_KN = p_NC.gather(1, logits.logits_KNC.argmax(-1).T).T.numpy()
    filled: Floats = np.where(np.isnan(p_KN), logits.correct_KN.numpy(), p_KN)
    return filled
