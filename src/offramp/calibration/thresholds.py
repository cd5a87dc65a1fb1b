"""Choosing one threshold per exit on held-out data, for a target or a budget.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from offramp.calibration.chosen import Calibration as Calibration
from offramp.calibration.search import Floats, Score, ThresholdSearch
from offramp.calibration.temperature import BoolArray, reached
from offramp.measure.exit_costs import ExitCosts
from offramp.policy.policies import State, ThresholdedPolicy

if TYPE_CHECKING:
    from offramp.calibration.logits import ExitLogits

_CHUNK = 2**24
"""So many logits at a time are asked about, where there are more."""


def confidences(
    logits: ExitLogits, policy: ThresholdedPolicy, off: frozenset[int] = frozenset()
) -> Floats:
    """Confidence of every exit about every sample, nobody leaving, shape (K, N)."""
    known_KN = logits.known_confidences(policy, off)
    if known_KN is not None:
        return known_KN
    import torch  # policies decide in it, and nothing else here does

    logits_KNC = torch.as_tensor(logits.logits_KNC)
    per_sample = max(1, logits_KNC[:, :1].numel())
    chunks = []
    for chunk_KBC in torch.split(logits_KNC, max(1, _CHUNK // per_sample), dim=1):
        confidence_KB = np.full(chunk_KBC.shape[:2], np.nan)
        state: State = ()
        for k, logits_BC in enumerate(chunk_KBC):
            if k not in off:
                lowest = policy.setting(k)._replace(threshold=0.0)
                may_leave_B, confidence_B, state = policy.decide(
                    k, logits_BC.float(), state, lowest
                )
                confidence_KB[k] = confidence_B.masked_fill(~may_leave_B, math.nan).double().numpy()
        chunks.append(confidence_KB)
    return np.concatenate(chunks, axis=1)


def reached_under(logits: ExitLogits, policy: ThresholdedPolicy) -> BoolArray:
    """Find which samples reach each exit under a policy, shape (K, N)."""
    return reached(confidences(logits, policy, policy.off_exits), policy.thresholds)


def search_for(
    logits: ExitLogits,
    policy: ThresholdedPolicy,
    worth_KN: Floats,
    confidence_KN: Floats,
    *,
    costs: ExitCosts,
    off: frozenset[int] = frozenset(),
) -> ThresholdSearch:
    """Make a search over thresholds that keeps to what a policy can do."""
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

    Returns the policy, its score, and the least mean cost of any thresholds. What a policy
    remembers changes when an exit is switched off; so confidences are then taken anew, and that
    exit stays off.
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
