"""Choosing by measured times of the parts: exits that do not pay go, budgets hold in milliseconds.

MACs do not know what it takes to stop and ask: a head that is small in MACs may be slow, and
copying the survivors takes time. For an accuracy target, thresholds are chosen as ever, and then an
exit is switched off, and the others are chosen anew, as long as that makes a batch faster. For a
budget, time stands in for MACs in the search.

Shapes: ``K`` exits, ``N`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.calibration.evidence import choose_policy
from offramp.calibration.logits import ExitLogits
from offramp.calibration.rules import Rule
from offramp.calibration.search import Floats
from offramp.calibration.targets import Budget, feasible
from offramp.calibration.thresholds import (
    Calibration,
    reached_under,
    search_thresholds,
)
from offramp.errors import InfeasibleTargetError, InvalidArgumentError, ShapeError
from offramp.measure.exit_costs import ExitCosts
from offramp.measure.profile import Profile
from offramp.policy.choice import Choice
from offramp.policy.policies import ThresholdedPolicy

_LEAST_GAIN = 0.005
"""An exit goes if a batch is faster by more than this fraction without it: less is noise."""

_HALVINGS = 8
"""Of the interval in which the cost lies that a budget in milliseconds allows: to 0.4 %."""


@dataclass(frozen=True, kw_only=True)
class SwitchedOff:
    """An exit that did not pay.

    Attributes:
        exit_index: Its number, from 0.
        ms_with: A batch with it, predicted.
        ms_without: A batch without it, the other thresholds chosen anew.
        asking_ms: Of ``ms_with``, what its head, decision and compaction take.
    """

    exit_index: int
    ms_with: float
    ms_without: float
    asking_ms: float


@dataclass(frozen=True, kw_only=True)
class LatencyCalibration(Choice):
    """A policy chosen by measured times.

    Attributes:
        chosen: The policy and what it reached on the calibration data.
        switched_off: Exits that did not pay, in the order in which they went.
        batch_ms: A batch with the policy, predicted.
        plain_ms: A batch with every exit but the final one off, predicted.
    """

    chosen: Calibration
    switched_off: tuple[SwitchedOff, ...]
    batch_ms: float
    plain_ms: float

    def as_policy(self) -> Any:
        """The policy."""
        return self.chosen.policy


def calibrate_for_latency(
    logits: ExitLogits,
    profile: Profile,
    *,
    batch_size: int,
    max_drop: float,
    rule: Rule | None = None,
) -> LatencyCalibration:
    """Choose thresholds for an accuracy target, and switch off exits that do not pay."""
    num_exits = logits.costs.num_exits
    _check_fits(profile, num_exits=num_exits, batch_size=batch_size)
    policy = _cheapest_of(logits.policies(rule), logits, max_drop)

    def reaching(policy: ThresholdedPolicy) -> list[float]:
        return _reaching(logits, policy, batch_size)

    def choose(off: frozenset[int]) -> tuple[float, Calibration]:
        chosen = choose_policy(logits, max_drop=max_drop, rule=policy, off=off)
        return profile.batch_ms(reaching(chosen.policy), chosen.policy.off_exits), chosen

    def without(k: int) -> frozenset[int]:
        return frozenset(range(num_exits - 1)) if policy.needs_every_exit else off | {k}

    off: frozenset[int] = frozenset()
    batch_ms, chosen = choose(off)
    switched_off = []
    while on := [k for k in range(num_exits - 1) if not chosen.policy.is_off(k)]:
        trials = {k: choose(without(k)) for k in on}
        k = min(on, key=lambda k: trials[k][0])
        if trials[k][0] > batch_ms * (1 - _LEAST_GAIN):
            break
        switched_off.append(
            SwitchedOff(
                exit_index=k,
                ms_with=batch_ms,
                ms_without=trials[k][0],
                asking_ms=profile.asking_ms(k, reaching(chosen.policy)[k]),
            )
        )
        off, (batch_ms, chosen) = without(k), trials[k]
    plain_ms = profile.batch_ms([batch_size] * num_exits, off=range(num_exits - 1))
    return LatencyCalibration(
        chosen=chosen, switched_off=tuple(switched_off), batch_ms=batch_ms, plain_ms=plain_ms
    )


def calibrate_to_milliseconds(
    logits: ExitLogits,
    profile: Profile,
    *,
    budget_ms: float,
    batch_size: int,
    rule: Rule | None = None,
) -> LatencyCalibration:
    """Choose thresholds for a mean time per sample, by measured times of the parts."""
    if not 0 < budget_ms < math.inf:
        raise InvalidArgumentError(
            f"The 'budget_ms' parameter must be a number of milliseconds above 0. Got {budget_ms}."
        )
    num_exits = logits.costs.num_exits
    _check_fits(profile, num_exits=num_exits, batch_size=batch_size)
    policy, *others = logits.policies(rule)
    if others:
        return _best_of((policy, *others), logits, profile, budget_ms, batch_size)
    costs, worth_KN = _costs_in_ns(profile, batch_size), logits.expected_scores_KN

    def within(allowed_ns: float) -> tuple[float, Calibration]:
        """Milliseconds of a batch, predicted, with the most accurate thresholds for a cost."""
        chosen = logits.reach(Budget(allowed_ns), policy, worth_KN=worth_KN, costs=costs)
        reaching = _reaching(logits, chosen.policy, batch_size)
        return profile.batch_ms(reaching, chosen.policy.off_exits), chosen

    fastest_ns = search_thresholds(logits, policy, worth_KN, _nothing_is_allowed, costs=costs)[2]
    best = within(fastest_ns)
    if best[0] > budget_ms * batch_size:
        fastest_ms = best[0] / batch_size
        raise InfeasibleTargetError(
            f"The 'budget_ms' parameter must be at least {fastest_ms:.4g}, the fastest there is on "
            f"these samples in batches of {batch_size}. Got {budget_ms}.",
            best_achievable=fastest_ms,
        )
    # A batch's time does not grow evenly with its survivors: halve what may be allowed too much.
    low_ns, high_ns = fastest_ns, float(sum(costs.stage_macs) + sum(costs.head_macs))
    for _ in range(_HALVINGS):
        middle_ns = (low_ns + high_ns) / 2
        found = within(middle_ns)
        if found[0] <= budget_ms * batch_size:
            low_ns, best = middle_ns, max(best, found, key=lambda each: each[1].quality)
        else:
            high_ns = middle_ns
    plain_ms = profile.batch_ms([batch_size] * num_exits, off=range(num_exits - 1))
    return LatencyCalibration(chosen=best[1], switched_off=(), batch_ms=best[0], plain_ms=plain_ms)


def _cheapest_of(
    policies: Sequence[ThresholdedPolicy], logits: ExitLogits, max_drop: float
) -> ThresholdedPolicy:
    """Of several policies the one that keeps to a target at the least MACs."""
    if len(policies) == 1:
        return policies[0]
    return choose_policy(logits, max_drop=max_drop, rule=lambda _: policies).policy


def _best_of(
    policies: Sequence[ThresholdedPolicy],
    logits: ExitLogits,
    profile: Profile,
    budget_ms: float,
    batch_size: int,
) -> LatencyCalibration:
    found = feasible(
        policies,
        lambda policy: calibrate_to_milliseconds(
            logits, profile, budget_ms=budget_ms, batch_size=batch_size, rule=policy
        ),
    )
    return max(found, key=lambda each: (each.chosen.quality, -each.batch_ms))


def _nothing_is_allowed(worth_J: Floats, cost_J: Floats) -> Floats:
    """A score for a search that only looks for the cheapest."""
    return np.full_like(cost_J, -np.inf)


def _costs_in_ns(profile: Profile, batch_size: int) -> ExitCosts:
    """Nanoseconds per sample in place of MACs, if whole batches reached every part."""
    per_sample = 1e6 / batch_size
    parts = range(len(profile.stage_ms))
    return ExitCosts(
        stage_macs=tuple(round(per_sample * profile.running_ms(k, batch_size)) for k in parts),
        head_macs=tuple(round(per_sample * profile.asking_ms(k, batch_size)) for k in parts),
    )


def _reaching(logits: ExitLogits, policy: ThresholdedPolicy, batch_size: int) -> list[float]:
    """Count the samples of a batch that reach each stage, a mean over the population."""
    reached_KN = reached_under(logits, policy)
    shares_K = np.average(reached_KN, axis=1, weights=logits.weights_N)
    return [batch_size * float(share) for share in shares_K]


def _check_fits(profile: Profile, *, num_exits: int, batch_size: int) -> None:
    if len(profile.stage_ms) != num_exits:
        raise ShapeError(
            f"Expected a profile of {num_exits} stages. Got one of {len(profile.stage_ms)}."
        )
    if not 1 <= batch_size <= profile.sizes[-1]:
        raise InvalidArgumentError(
            f"The 'batch_size' parameter must be an int in [1, {profile.sizes[-1]}], the sizes "
            f"that were timed. Got {batch_size}."
        )
