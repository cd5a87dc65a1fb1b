"""Policies as values that JSON can hold, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from offramp.decoding import decode, decode_tagged
from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.policy.choice import Choice
from offramp.policy.dense_policies import AgreementPolicy, DensePolicy
from offramp.policy.policies import PatiencePolicy, Policy, ThresholdPolicy
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy, RoutingPolicy

_KINDS: dict[str, type[Any]] = {
    "threshold": ThresholdPolicy,
    "patience": PatiencePolicy,
    "dense": DensePolicy,
    "agreement": AgreementPolicy,
    GatePolicy.kind: GatePolicy,
    HaltingPolicy.kind: HaltingPolicy,
}
_ADDED_LATER = {"threshold": {"temperatures": None}, "patience": {"thresholds": None}}
"""Fields that older files lack, by kind."""
_NUMBERS: Any = float | list[float | list[float]]
"""A tensor of up to two axes."""


def policy_to_dict(policy: Policy | RoutingPolicy) -> dict[str, Any]:
    """Describe a policy in values that JSON can hold (+inf becomes None)."""
    kinds = _KINDS if isinstance(policy, tuple(_KINDS.values())) else _all_kinds()
    for kind, known in kinds.items():
        if isinstance(policy, known):
            return {
                "kind": kind,
                **{field.name: _plain(getattr(policy, field.name)) for field in fields(known)},
            }
    names = [known.__name__ for known in kinds.values()]
    advice = ": take its .policy" if isinstance(policy, Choice) else ""
    raise InvalidArgumentError(
        f"Expected one of {', '.join(names)}. Got {type(policy).__name__}{advice}."
    )


def policy_from_dict(content: Any) -> Policy | RoutingPolicy:
    """Rebuild a policy from :func:`policy_to_dict`."""
    try:
        content = _migrated(content)
        is_known = isinstance(content, Mapping) and str(content.get("kind")) in _KINDS
        policy = decode_tagged(content, _KINDS if is_known else _all_kinds(), hook=_tensor)
        lacking = [f.name for f in fields(policy) if f.name not in content]
        if lacking:
            raise ArtifactError(f"Object lacks the field {lacking[0]}")
    except ArtifactError as error:
        raise ArtifactError(f"Expected a policy, got a damaged one ({error}).") from error
    made: Policy | RoutingPolicy = policy
    return made


def _all_kinds() -> dict[str, type[Any]]:
    """The kinds with that whose scorers are tensors, which takes torch."""
    from offramp.policy.controller import ControllerPolicy

    return {**_KINDS, "controller": ControllerPolicy}


def without_inf(thresholds: Sequence[float]) -> list[float | None]:
    """Thresholds in values that JSON can hold."""
    return [None if t == math.inf else t for t in thresholds]


def _migrated(content: Any) -> Any:
    """A policy as it is written today, with +inf for exits that are off."""
    if not isinstance(content, Mapping) or not isinstance(content.get("kind"), str):
        return content
    content = {**_ADDED_LATER.get(content["kind"], {}), **content}
    thresholds = content.get("thresholds")
    if isinstance(thresholds, list | tuple):
        content["thresholds"] = [math.inf if t is None else t for t in thresholds]
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tensors"):  # a scorer
        return {name: _shortest(tensor.tolist()) for name, tensor in value.tensors.items()}
    return None if value == math.inf else value


def _shortest(numbers: Any) -> Any:
    if isinstance(numbers, list):
        return [_shortest(number) for number in numbers]
    return float(f"{numbers:.9g}")  # nine digits tell any two float32 apart


def _tensor(kind: type, value: Any) -> Any:
    """Make the numbers of a scorer."""
    import torch

    return torch.tensor(decode(value, _NUMBERS), dtype=torch.float32)
