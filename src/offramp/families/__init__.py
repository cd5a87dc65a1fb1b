"""Families of networks: the one table, and what looks a family up."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp.errors import InvalidArgumentError, NotCalibratedError
from offramp.families.exits import EXITS
from offramp.families.family import Family, TorchRunner
from offramp.families.halting import HALTING
from offramp.families.skip import SKIP
from offramp.measure.agreement import Reference, compare, require_agreement
from offramp.model.multi_exit import Features, as_features
from offramp.policy.choice import Choice
from offramp.policy.policies import Policy
from offramp.policy.routing_policy import RoutingPolicy
from offramp.results import AdaptiveResult

FAMILIES: dict[str, Family[Any, Any]] = {family.name: family for family in (EXITS, SKIP, HALTING)}
"""Every family, by its name: a new one is a line here."""


def family_of(network: nn.Module) -> Family[Any, Any]:
    """Look up the family of a network."""
    for family in FAMILIES.values():
        if isinstance(network, family.network):
            return family
    raise InvalidArgumentError(
        "Expected a network with exits, gates or halting tokens. Got "
        f"{type(network).__name__}: call add_exits(backbone, ...), add_gates or add_halting first."
    )


def family_for(policy: Policy | RoutingPolicy | None) -> Family[Any, Any]:
    """Look up the family that a policy is for; None stands before calibration, of exits."""
    for family in FAMILIES.values():
        if isinstance(policy, family.policy):
            return family
    return EXITS


def make_runner(
    network: nn.Module, policy: Policy | RoutingPolicy | Choice | None
) -> TorchRunner[Any, Any]:
    """Make the runner that fits a network and its policy, or what chose one."""
    family = family_of(network)
    if isinstance(policy, Choice):
        policy = policy.as_policy()
    is_missing = policy is None and family.as_trained is None  # which the runner refuses
    if not is_missing and not isinstance(policy, family.policy):
        raise NotCalibratedError(
            f"Expected a policy for a {type(network).__name__}. Got a {type(policy).__name__}. "
            "Choose one for this network: offramp calibrate RUN"
        )
    return family.runner(network, policy)


def reference_of(
    network: nn.Module, policy: Policy | RoutingPolicy, inputs: Tensor | Features
) -> Reference:
    """Compute everything on every sample, and choose afterwards."""
    return family_of(network).reference(network, policy, as_features(inputs))


def check_agreement(
    result: AdaptiveResult[Any], runner: TorchRunner[Any, Any], inputs: Tensor | Features
) -> None:
    """Raise OfframpError if running less answers otherwise than choosing afterwards."""
    require_agreement(compare(result, reference_of(runner.network, runner.policy, inputs)))
