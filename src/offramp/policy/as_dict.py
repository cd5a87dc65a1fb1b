"""Policies as values that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.policy.controller import ControllerPolicy, scorers_from_dicts, scorers_to_dicts
from offramp.policy.dense_policies import AgreementPolicy, DensePolicy
from offramp.policy.policies import PatiencePolicy, Policy, ThresholdPolicy
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy, RoutingPolicy

_ROUTING: dict[str, type[RoutingPolicy]] = {
    policy.kind: policy for policy in (GatePolicy, HaltingPolicy)
}


def policy_to_dict(policy: Policy | RoutingPolicy) -> dict[str, Any]:
    """Describe a policy in values that JSON can hold (+inf becomes None).

    Args:
        policy: A policy that Offramp ships.
    Returns:
        A dictionary that :func:`policy_from_dict` reads.
    Raises:
        InvalidArgumentError: If the policy is of a class that Offramp does not know.
    """
    if isinstance(policy, ThresholdPolicy):
        return {
            "kind": "threshold",
            "rule": policy.rule,
            "thresholds": without_inf(policy.thresholds),
            "temperatures": None if policy.temperatures is None else list(policy.temperatures),
        }
    if isinstance(policy, PatiencePolicy):
        return {
            "kind": "patience",
            "rule": policy.rule,
            "patience": policy.patience,
            "num_exits": policy.num_exits,
            "thresholds": without_inf(policy.thresholds or ()),
        }
    if isinstance(policy, ControllerPolicy):
        return {
            "kind": "controller",
            "thresholds": without_inf(policy.thresholds),
            "scorers": scorers_to_dicts(policy.scorers),
        }
    if isinstance(policy, DensePolicy):
        return {
            "kind": "dense",
            "rule": policy.rule,
            "thresholds": without_inf(policy.thresholds),
            "pixel_threshold": policy.pixel_threshold,
            "temperatures": None if policy.temperatures is None else list(policy.temperatures),
        }
    if isinstance(policy, AgreementPolicy):
        return {"kind": "agreement", "thresholds": without_inf(policy.thresholds)}
    if isinstance(policy, RoutingPolicy):
        return {"kind": policy.kind, "threshold": policy.threshold}
    advice = ": take its .policy" if hasattr(policy, "policy") else ""  # of a calibration
    raise InvalidArgumentError(
        "Expected a ThresholdPolicy, a PatiencePolicy, a ControllerPolicy, a DensePolicy, an "
        "AgreementPolicy, a GatePolicy or a HaltingPolicy. "
        f"Got {type(policy).__name__}{advice}."
    )


def policy_from_dict(content: dict[str, Any]) -> Policy | RoutingPolicy:
    """Rebuild a policy from :func:`policy_to_dict`.

    Args:
        content: The dictionary.
    Returns:
        The policy.
    Raises:
        ArtifactError: If the dictionary is no policy or names a kind this version does not know.
    """
    try:
        if content["kind"] == "threshold":
            temperatures = content.get("temperatures")
            return ThresholdPolicy(
                _with_inf(content["thresholds"]),
                rule=content["rule"],
                temperatures=None if temperatures is None else tuple(temperatures),
            )
        if content["kind"] == "patience":
            thresholds = content.get("thresholds")  # older files hold none
            return PatiencePolicy(
                content["patience"],
                content["num_exits"],
                rule=content["rule"],
                thresholds=None if thresholds is None else _with_inf(thresholds),
            )
        if content["kind"] == "controller":
            return ControllerPolicy(
                _with_inf(content["thresholds"]), scorers_from_dicts(content["scorers"])
            )
        if content["kind"] == "dense":
            temperatures = content["temperatures"]
            return DensePolicy(
                _with_inf(content["thresholds"]),
                rule=content["rule"],
                pixel_threshold=content["pixel_threshold"],
                temperatures=None if temperatures is None else tuple(temperatures),
            )
        if content["kind"] == "agreement":
            return AgreementPolicy(_with_inf(content["thresholds"]))
        if content["kind"] in _ROUTING:
            return _ROUTING[content["kind"]](content["threshold"])
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"Expected a policy, got a damaged one ({error}).") from error
    raise ArtifactError(
        "Expected a threshold, patience, controller, dense, agreement, gates or halting policy. "
        f"Got kind {content['kind']!r}."
    )


def without_inf(thresholds: Sequence[float]) -> list[float | None]:
    """Thresholds in values that JSON can hold.

    Args:
        thresholds: Numbers.
    Returns:
        The same, None for +inf.
    """
    return [None if t == math.inf else t for t in thresholds]


def _with_inf(thresholds: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.inf if t is None else t for t in thresholds)
