"""What the card of a run says of each family of networks."""

from __future__ import annotations

from typing import NamedTuple

from offramp.policy.policies import Policy
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy, RoutingPolicy

_USE_POLICY = """\
result = AdaptiveRunner(run.network, run.policy).run(inputs)
print(result.output.argmax(1), result.exit_index, result.macs)  # class, exit, MACs that ran"""
_USE_GATES = """\
result = SkipRunner(run.network, run.policy).run(inputs)
print(result.output.argmax(-1), result.blocks.sum(1), result.macs)  # class, blocks and MACs run"""
_USE_HALTING = """\
result = HaltingRunner(run.network, run.policy).run(inputs)
print(result.output.argmax(-1), result.tokens.sum(1), result.macs)  # class, tokens and MACs run"""


class Words(NamedTuple):
    """What is said of a family of networks."""

    tag: str
    heading: str
    rule: str
    runner: str
    use: str
    less: str
    less_metric: str
    all: str
    all_metric: str


_EXITS = Words(
    tag="early-exit",
    heading="Who leaves where",
    rule="",
    runner="AdaptiveRunner",
    use=_USE_POLICY,
    less="leaving early",
    less_metric="with early exit",
    all="every sample to the final exit",
    all_metric="of the final exit alone",
)
_GATES = Words(
    tag="skipnet",
    heading="Which blocks run",
    rule="A block runs where its gate's probability is",
    runner="SkipRunner",
    use=_USE_GATES,
    less="skipping blocks",
    less_metric="with blocks skipped",
    all="every block run",
    all_metric="with every block run",
)

_HALTING = Words(
    tag="a-vit",
    heading="When a token halts",
    rule="A token halts where its scores add up to",
    runner="HaltingRunner",
    use=_USE_HALTING,
    less="dropping tokens that have halted",
    less_metric="with tokens dropped",
    all="with a threshold of 1, at which tokens stay longest",
    all_metric="with a threshold of 1",
)
_ROUTING: dict[type[RoutingPolicy], Words] = {GatePolicy: _GATES, HaltingPolicy: _HALTING}


def words_for(policy: Policy | RoutingPolicy | None) -> Words:
    """What is said of a network.

    Args:
        policy: Its policy; None before calibration.
    Returns:
        Words for its card.
    """
    return _ROUTING[type(policy)] if isinstance(policy, RoutingPolicy) else _EXITS
