"""What a rule's name, a policy or a function stands for: policies whose thresholds are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from offramp.measure.outputs import LABELS, MAPS, Outputs
from offramp.policy.confidence import PIXEL_SHARE
from offramp.policy.dense_policies import DensePolicy, dense_policy
from offramp.policy.policies import ThresholdedPolicy, ThresholdPolicy
from offramp.policy.rules import RULES

Rule = str | ThresholdedPolicy | Callable[[Any], ThresholdedPolicy | Sequence[ThresholdedPolicy]]
"""The name of a confidence function, a policy, or a function that makes one from samples, or
several, of which the best is to be chosen."""

PIXEL_THRESHOLDS = (0.9, 0.8, 0.95, 0.7, 0.98, 0.6, 0.5)
"""Thresholds for pixels that are tried where those are to be chosen too; of equals, the first."""


def _of_labels(rule: str, thresholds: tuple[float, ...]) -> tuple[ThresholdedPolicy, ...]:
    return (ThresholdPolicy(thresholds, rule=rule),)


def _of_maps(rule: str, thresholds: tuple[float, ...]) -> tuple[ThresholdedPolicy, ...]:
    if rule == PIXEL_SHARE:
        return tuple(DensePolicy(thresholds, pixel_threshold=each) for each in PIXEL_THRESHOLDS)
    return (dense_policy(rule, thresholds),)


_POLICIES = {LABELS.name: _of_labels, MAPS.name: _of_maps}


def policies_named(
    rule: str | None, num_exits: int, outputs: Outputs
) -> tuple[ThresholdedPolicy, ...]:
    """Policies of a confidence function, the default one if None; no exit is on."""
    nobody = (math.inf,) * (num_exits - 1)
    return _POLICIES[outputs.name](rule or RULES[outputs.name].default, nobody)
