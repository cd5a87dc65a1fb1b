"""Choosing one threshold per exit on held-out data, for a target or a budget.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.calibration.asked import IN_PYTHON, Asked, cannot_tell
from offramp.calibration.chosen import Calibration as Calibration
from offramp.calibration.chosen import ExitOfCalibration
from offramp.calibration.logits import ExitLogits, require_logits
from offramp.calibration.risk import RISKS, check_risk_fits
from offramp.calibration.rules import Rule, policies_like
from offramp.calibration.search import Floats, Score, ThresholdSearch, exits_left_by
from offramp.calibration.targets import (
    QUALITY_GAP,
    RiskLimit,
    as_target,
    budget_too_low,
    feasible,
    risk_too_low,
)
from offramp.calibration.temperature import BoolArray, fit_temperature, reached
from offramp.errors import FewSamplesWarning, InvalidArgumentError
from offramp.measure.cost import ExitCosts
from offramp.policy.policies import State, ThresholdedPolicy

_CHUNK = 2**24
"""So many logits at a time are asked about, where there are more."""


def calibrate(
    logits: ExitLogits,
    *,
    max_drop: float | None = None,
    max_risk: float | None = None,
    risk: str = "accuracy_gap",
    budget_macs: float | None = None,
    budget_share: float | None = None,
    rule: Rule | None = None,
    off: frozenset[int] = frozenset(),
) -> Calibration:
    """Choose thresholds for an accuracy target or for a budget.

    What is reached holds for the given samples; on other samples of the same kind expect about
    the same, without a guarantee (:func:`~offramp.calibrate_with_guarantee` gives one). Use data
    that neither trained the network nor will judge it.

    Args:
        logits: Every exit's logits on held-out data.
        max_drop: Spend least while losing at most this much accuracy against the final exit, a
            fraction in [0, 1), e.g. 0.01. Always possible: every exit can be switched off. Where
            every pixel has a class, so much mean IoU.
        max_risk: The same for another risk: spend least while it is at most this.
        risk: What ``max_risk`` bounds: accuracy_gap, disagreement, error or brier_gap; where
            every pixel has a class, pixel_error_gap.
        budget_macs: Be most accurate at no more than this many mean MACs per sample; candidates
            are compared by :func:`expected_correctness`.
        budget_share: The same, as a share of the plain network's MACs, above 0.
        rule: Confidence function: entropy (the default), max_probability or margin; where every
            pixel has a class, pixel_share (the default, whose threshold for pixels is chosen too),
            mean_max_probability, mean_entropy, low_quantile or agreement. Or a policy, of which
            all but the thresholds is kept; or a function that makes one from the samples, or
            several, of which the best is chosen.
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
    if not logits.is_dense and (doubt := cannot_tell(chosen.asked, logits.effective_num_samples)):
        warnings.warn(f"{doubt}, or use {IN_PYTHON}.", FewSamplesWarning, stacklevel=2)
    return chosen


def choose_policy(
    logits: ExitLogits,
    *,
    rule: Rule | None = None,
    off: frozenset[int] = frozenset(),
    risk: str = "accuracy_gap",
    **targets: Any,
) -> Calibration:
    """Choose thresholds as :func:`calibrate` does, without a word about few samples."""
    require_logits(logits)
    target = as_target(
        **targets,
        risk=risk,
        plain_macs=logits.costs.plain_macs,
        drop=QUALITY_GAP if logits.is_dense else "accuracy_gap",
    )
    policies = policies_like(rule, logits)
    _check_off(off, num_exits=logits.costs.num_exits)
    if isinstance(target, RiskLimit):
        limit = target
        reached = feasible(policies, lambda policy: _within_risk(logits, policy, limit, off=off))
        best = min(reached, key=lambda each: (each.mean_macs, -each.quality))
    else:
        macs = target.macs
        reached = feasible(policies, lambda policy: _within_budget(logits, policy, macs, off=off))
        best = max(reached, key=lambda each: (each.quality, -each.mean_macs))
    return replace(best, asked=Asked.of(len(logits.labels_N), risk=risk, **targets))


def _check_off(off: frozenset[int], *, num_exits: int) -> None:
    if not off <= set(range(num_exits - 1)):
        raise InvalidArgumentError(
            f"The 'off' parameter must hold exits in [0, {num_exits - 2}], the final one never. "
            f"Got {sorted(off)}."
        )


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
    """What a policy reaches on given samples.

    Args:
        logits: Every exit's logits.
        policy: The policy.
    Returns:
        It, with its accuracy and mean MACs.
    """
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
    logits: ExitLogits, policy: ThresholdedPolicy, macs: float, *, off: frozenset[int]
) -> Calibration:
    worth_KN, costs = expected_correctness(logits), costs_under(logits, policy)
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
        Shape (K, N); about in [0, 1], since the constants may lead a little beyond. Where every
        pixel has a class, the confusion matrices as they are: an image's many pixels are no luck.
    """
    if logits.is_dense:
        return logits.scores_KN
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
        Shape (K, N), in [0, 1]. Right or wrong stands in where the final exit's logits are NaN,
        and the share of right pixels where every pixel has a class.
    """
    if logits.is_dense:
        return logits.correct_KN.numpy()
    final_NC = logits.logits_KNC[-1].double()
    p_NC = (final_NC / fit_temperature(logits, -1)).softmax(-1)
    p_KN = p_NC.gather(1, logits.logits_KNC.argmax(-1).T).T.numpy()
    filled: Floats = np.where(np.isnan(p_KN), logits.correct_KN.numpy(), p_KN)
    return filled
