"""Choosing one threshold per exit on held-out data, for a target or a budget.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from offramp.calibration.chosen import Calibration as Calibration
from offramp.calibration.chosen import ExitOfCalibration
from offramp.calibration.risk import RISKS, cautious_losses, check_risk_fits
from offramp.calibration.search import Floats, Score, ThresholdSearch, exits_left_by
from offramp.calibration.targets import (
    QUALITY_GAP,
    Budget,
    RiskLimit,
    budget_too_low,
    feasible,
    risk_too_low,
)
from offramp.calibration.temperature import BoolArray, reached
from offramp.errors import InfeasibleTargetError, InvalidArgumentError
from offramp.measure.cost import ExitCosts
from offramp.policy.policies import State, ThresholdedPolicy

if TYPE_CHECKING:
    from offramp.calibration.logits import ExitLogits

_CHUNK = 2**24
"""So many logits at a time are asked about, where there are more."""


def best_thresholds(
    logits: ExitLogits,
    target: Budget | RiskLimit,
    policies: Sequence[ThresholdedPolicy],
    *,
    off: frozenset[int],
) -> Calibration:
    """Choose the cheapest thresholds within a risk, or the most accurate within a budget."""
    _check_off(off, num_exits=logits.costs.num_exits)
    if isinstance(target, RiskLimit):
        reached = feasible(policies, lambda policy: _within_risk(logits, policy, target, off=off))
        return min(reached, key=lambda each: (each.mean_macs, -each.quality))
    macs = target.macs
    reached = feasible(policies, lambda policy: _within_budget(logits, policy, macs, off=off))
    return max(reached, key=lambda each: (each.quality, -each.mean_macs))


def _check_off(off: frozenset[int], *, num_exits: int) -> None:
    if not off <= set(range(num_exits - 1)):
        raise InvalidArgumentError(
            f"The 'off' parameter must hold exits in [0, {num_exits - 2}], the final one never. "
            f"Got {sorted(off)}."
        )


def confidences(
    logits: ExitLogits, policy: ThresholdedPolicy, off: frozenset[int] = frozenset()
) -> Floats:
    """Confidence of every exit about every sample, nobody leaving."""
    per_sample = max(1, logits.logits_KNC[:, :1].numel())
    chunks = torch.split(logits.logits_KNC, max(1, _CHUNK // per_sample), dim=1)
    return np.concatenate([_confidences(chunk, policy, off) for chunk in chunks], axis=1)


def _confidences(logits_KNC: Tensor, policy: ThresholdedPolicy, off: frozenset[int]) -> Floats:
    confidence_KN = np.full(logits_KNC.shape[:2], np.nan)
    state: State = ()
    for k, logits_NC in enumerate(logits_KNC):
        if k not in off:
            lowest = policy.setting(k)._replace(threshold=0.0)
            may_leave_N, confidence_N, state = policy.decide(k, logits_NC.float(), state, lowest)
            confidence_KN[k] = confidence_N.masked_fill(~may_leave_N, math.nan).double().numpy()
    return confidence_KN


def reached_under(logits: ExitLogits, policy: ThresholdedPolicy) -> BoolArray:
    """Which samples reach each exit under a policy."""
    return reached(confidences(logits, policy, policy.off_exits), policy.thresholds)


def costs_under(logits: ExitLogits, policy: ThresholdedPolicy) -> ExitCosts:
    """Costs of stages and exits, with the decisions of a policy."""
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
    """A search over thresholds that keeps to what a policy can do."""
    return ThresholdSearch(
        confidence_KN,
        worth_KN,
        costs,
        weights_N=logits.weights_N,
        worth=None if worth_KN.ndim == 2 else logits.quality,
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
    """
    confidence_KN = confidences(logits, policy, off)
    cheapest_macs = math.inf
    while True:
        search = search_for(logits, policy, worth_KN, confidence_KN, costs=costs, off=off)
        thresholds, best_score = search.best(score)
        cheapest_macs = min(cheapest_macs, search.cheapest_macs)
        found = policy.with_thresholds(thresholds)
        off = found.off_exits
        on = [k for k in range(found.num_exits - 1) if k not in off]  # the final one takes all
        anew_KN = confidences(logits, policy, off)
        if np.array_equal(anew_KN[on], confidence_KN[on], equal_nan=True):
            return found, best_score, cheapest_macs
        confidence_KN = anew_KN


def measure_policy(logits: ExitLogits, policy: ThresholdedPolicy) -> Calibration:
    """What a policy reaches on given samples."""
    confidence_KN = confidences(logits, policy, policy.off_exits)
    exit_N = exits_left_by(confidence_KN, policy.thresholds)
    exit_macs = costs_under(logits, policy).exit_macs(policy.off_exits)
    macs_N, weights_N = np.array(exit_macs, dtype=np.float64)[exit_N], logits.weights_N
    leaving_K = np.bincount(exit_N, weights=weights_N, minlength=len(exit_macs)) / len(exit_N)
    rows = zip(logits.numbers, leaving_K.tolist(), exit_macs, strict=True)
    return Calibration(
        policy=policy,
        mean_macs=float(np.average(macs_N, weights=weights_N)),
        final_exit=logits.figures(np.full_like(exit_N, len(exit_macs) - 1)),
        plain_macs=logits.costs.plain_macs,
        num_samples=len(exit_N),
        exits=tuple(ExitOfCalibration(index=k, share=share, macs=macs) for k, share, macs in rows),
        **vars(logits.figures(exit_N)),
    )


def _within_risk(
    logits: ExitLogits,
    policy: ThresholdedPolicy,
    limit: RiskLimit,
    *,
    off: frozenset[int],
) -> Calibration:
    worth_KN, best_possible = _worth_against(limit.risk, logits)
    floor = best_possible - limit.most - 1e-12
    found, best_score, _ = search_thresholds(
        logits,
        policy,
        worth_KN,
        lambda worth_J, macs_J: np.where(worth_J >= floor, -macs_J, -np.inf),
        costs=costs_under(logits, policy),
        off=off,
    )
    if best_score == -math.inf:
        lowest = -float(np.average(worth_KN, axis=1, weights=logits.weights_N).max())
        raise risk_too_low(limit, lowest=lowest, where="any exit")
    return measure_policy(logits, found)


def _worth_against(risk: str, logits: ExitLogits) -> tuple[Floats, float]:
    """What is to be kept high where a risk is limited, and what it is without the risk."""
    if risk == QUALITY_GAP:  # the final exit itself is always within it
        return logits.scores_KN, float(logits.quality_K[-1])
    check_risk_fits(risk, logits)
    return -RISKS[risk].losses(logits), 0.0


def _within_budget(
    logits: ExitLogits,
    policy: ThresholdedPolicy,
    macs: float,
    *,
    off: frozenset[int] = frozenset(),
) -> Calibration:
    worth_KN, costs = logits.expected_scores_KN, costs_under(logits, policy)
    return calibrate_within(logits, policy, macs, worth_KN=worth_KN, costs=costs, off=off)


def calibrate_within(
    logits: ExitLogits,
    policy: ThresholdedPolicy,
    budget: float,
    *,
    worth_KN: Floats,
    costs: ExitCosts,
    off: frozenset[int] = frozenset(),
) -> Calibration:
    """The most accurate thresholds within a budget, in the unit of given costs."""
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


def candidates_on(
    finding: ExitLogits, policy: ThresholdedPolicy, risk: str
) -> list[ThresholdedPolicy]:
    """Policies on the way from the safest, where nobody leaves, to the cheapest.

    Of right and wrong, a few hundred samples tell little: there, answers are judged by how likely
    the final exit finds them.
    """
    finding, counted = finding.rounded(), RISKS[risk]
    worth_KN = finding.plausibility_KN if counted.counts_errors else -counted.losses(finding)
    search = search_for(
        finding,
        policy,
        worth_KN,
        confidences(finding, policy),
        costs=costs_under(finding, policy),
    )
    return [policy.with_thresholds(thresholds) for thresholds in search.front()]


def losses_under(
    logits: ExitLogits, policies: Sequence[ThresholdedPolicy], risk: str
) -> Iterator[Floats]:
    """Loss of every sample under one policy after the other, weights multiplied in."""
    losses_KN = cautious_losses(risk, logits) * logits.weights_N
    for policy, confidence_KN in _with_confidences(logits, policies):
        exit_N = exits_left_by(confidence_KN, policy.thresholds)
        yield losses_KN[exit_N, np.arange(len(exit_N))]


def _with_confidences(
    logits: ExitLogits, policies: Sequence[ThresholdedPolicy]
) -> Iterator[tuple[ThresholdedPolicy, Floats]]:
    """Each policy with its confidences, which policies with the same exits off share."""
    known: dict[frozenset[int], Floats] = {}
    for policy in policies:
        off = policy.off_exits
        if off not in known:
            known[off] = confidences(logits, policy, off)
        yield policy, known[off]


def least_macs(logits: ExitLogits, policies: Sequence[ThresholdedPolicy]) -> float:
    """Mean MACs of the smallest budget that one of the policies can keep."""
    cheapest_macs = float(min(macs_alone(logits.costs)))

    def least(policy: ThresholdedPolicy) -> float:
        try:
            _within_budget(logits, policy, cheapest_macs)
        except InfeasibleTargetError as error:  # NaN, or a policy that waits, holds samples back
            return error.best_achievable
        return cheapest_macs

    return min(map(least, policies))


def macs_alone(costs: ExitCosts) -> list[int]:
    """MACs of a sample that leaves at each exit, no head before it run."""
    return [costs.exit_macs(frozenset(range(k)))[k] for k in range(costs.num_exits)]
