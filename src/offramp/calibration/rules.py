"""What a rule's name, a policy or a function stands for: policies whose thresholds are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from offramp.calibration.logits import ExitLogits
from offramp.errors import InvalidArgumentError
from offramp.policy.confidence import PIXEL_SHARE
from offramp.policy.dense_policies import DensePolicy, dense_policy
from offramp.policy.policies import ThresholdedPolicy, ThresholdPolicy

Rule = (
    str
    | ThresholdedPolicy
    | Callable[[ExitLogits], ThresholdedPolicy | Sequence[ThresholdedPolicy]]
)
"""The name of a confidence function, a policy, or a function that makes one from samples, or
several, of which the best is to be chosen."""

PIXEL_THRESHOLDS = (0.9, 0.8, 0.95, 0.7, 0.98, 0.6, 0.5)
"""Thresholds for pixels that are tried where those are to be chosen too; of equals, the first."""


def policies_like(rule: Rule | None, logits: ExitLogits) -> tuple[ThresholdedPolicy, ...]:
    """The policies whose thresholds are to be chosen, and of which the best is.

    Args:
        rule: As for :func:`calibrate`.
        logits: Every exit's logits.
    Returns:
        At least one policy; their own thresholds do not matter.
    Raises:
        InvalidArgumentError: If there is no such confidence function for these logits, or a policy
            is for another number of exits.
    """
    num_exits = logits.costs.num_exits
    if rule is None or isinstance(rule, str):
        nobody = (math.inf,) * (num_exits - 1)
        return _dense_named(rule, nobody) if logits.is_dense else (_named(rule, nobody),)
    made = rule if isinstance(rule, ThresholdedPolicy) else rule(logits)
    policies = (made,) if isinstance(made, ThresholdedPolicy) else tuple(made)
    for policy in policies:
        if policy.num_exits != num_exits:
            raise InvalidArgumentError(
                f"Expected a policy for {num_exits} exits. Got one for {policy.num_exits}."
            )
    return policies


def policy_like(rule: Rule | None, logits: ExitLogits) -> ThresholdedPolicy:
    """The first of :func:`policies_like`, where there is no choosing.

    Args:
        rule: As for :func:`calibrate`.
        logits: Every exit's logits.
    Returns:
        A policy; its own thresholds do not matter.
    Raises:
        InvalidArgumentError: As for :func:`policies_like`.
    """
    return policies_like(rule, logits)[0]


def _named(rule: str | None, nobody: tuple[float, ...]) -> ThresholdedPolicy:
    return ThresholdPolicy(nobody, rule=rule or "entropy")


def _dense_named(rule: str | None, nobody: tuple[float, ...]) -> tuple[ThresholdedPolicy, ...]:
    if rule in (None, PIXEL_SHARE):
        return tuple(DensePolicy(nobody, pixel_threshold=each) for each in PIXEL_THRESHOLDS)
    assert rule is not None
    return (dense_policy(rule, nobody),)
