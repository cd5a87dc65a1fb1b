"""Rules: names, policies or functions that stand for policies whose thresholds are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from offramp.measure.outputs import Outputs
from offramp.policy.policies import ThresholdedPolicy
from offramp.policy.rules import RULES

Rule = str | ThresholdedPolicy | Callable[[Any], ThresholdedPolicy | Sequence[ThresholdedPolicy]]
"""The name of a confidence function, a policy, or a function that makes one from samples, or
several, of which the best is to be chosen."""

PIXEL_THRESHOLDS = (0.9, 0.8, 0.95, 0.7, 0.98, 0.6, 0.5)
"""Thresholds for pixels that are tried where those are to be chosen too; of equals, the first."""


def policies_named(
    rule: str | None, num_exits: int, outputs: Outputs
) -> tuple[ThresholdedPolicy, ...]:
    """Policies of a confidence function, the default one if None; no exit is on."""
    rules = RULES[outputs.name]
    policy: Any = rules.make(rule or rules.default, (math.inf,) * (num_exits - 1))
    if "pixel_threshold" not in policy.number_names:
        return (policy,)
    return tuple(replace(policy, pixel_threshold=each) for each in PIXEL_THRESHOLDS)
