"""What is timed against what, in torch; ``bundle_contenders.py`` has the same for bundles.

A contender runs all batches once and returns nothing of interest. By name: ``plain``, the plain
network; ``all_exits``, every stage and head, then choosing; ``adaptive``, leaving early;
``never_exit``, asking at every exit and letting nobody go; ``stages``, the stages and heads alone
on those who reached them; ``stage_0``, ``stage_1``, ..., each stage with its head on full batches.

Where blocks are skipped or tokens halt, the same names stand for: everything, then masking
(``all_exits``, as in the published code); skipping or dropping (``adaptive``); asking every gate
and skipping nothing, or dropping only at a threshold of 1 (``never_exit``). There are no stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from offramp.inference.agreement import all_exits_loop
from offramp.inference.halting import HaltingRunner
from offramp.inference.runner import AdaptiveRunner, TorchRunner
from offramp.inference.skipping import SkipRunner
from offramp.model.multi_exit import Features
from offramp.policy.policies import Decision, Policy, Setting, State
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy
from offramp.routing.skip import at_threshold

Contenders = Mapping[str, Callable[[], object]]


@torch.no_grad()
def torch_contenders(runner: TorchRunner, batches: Sequence[Tensor]) -> Contenders:
    """The contenders that torch runs.

    Args:
        runner: Holds the network and the policy.
        batches: Real samples, on the network's device.
    Returns:
        Contenders by name.
    """
    if isinstance(runner, SkipRunner):
        contenders = _skip_contenders(runner, batches)
    elif isinstance(runner, HaltingRunner):
        contenders = _halting_contenders(runner, batches)
    else:
        contenders = _exit_contenders(runner, batches)
    return {name: torch.no_grad()(run) for name, run in contenders.items()}


def _skip_contenders(runner: SkipRunner, batches: Sequence[Tensor]) -> Contenders:
    network, choose = runner.network, at_threshold(runner.policy.threshold)
    plain = network.plain().eval()
    nothing_skipped = SkipRunner(network, GatePolicy(0.0))
    return {
        "plain": lambda: [plain(batch) for batch in batches],
        "all_exits": lambda: [network(batch, choose) for batch in batches],
        "adaptive": lambda: [runner.run(batch) for batch in batches],
        "never_exit": lambda: [nothing_skipped.run(batch) for batch in batches],
    }


def _halting_contenders(runner: HaltingRunner, batches: Sequence[Tensor]) -> Contenders:
    network, threshold = runner.network, runner.policy.threshold
    batches = [network.trimmed((batch,))[0] for batch in batches]
    plain = network.plain().eval()
    longest = HaltingRunner(network, HaltingPolicy(1.0))
    return {
        "plain": lambda: [plain(batch) for batch in batches],
        "all_exits": lambda: [network(batch, threshold=threshold) for batch in batches],
        "adaptive": lambda: [runner.run(batch) for batch in batches],
        "never_exit": lambda: [longest.run(batch) for batch in batches],
    }


def _exit_contenders(runner: AdaptiveRunner, batches: Sequence[Tensor]) -> Contenders:
    network, policy = runner.network, runner.policy
    batches = [network.trimmed((batch,))[0] for batch in batches]
    plain = network.plain().eval()
    never = AdaptiveRunner(network, _AskButStay(policy))
    survivors = [_features_of_survivors(runner, batch) for batch in batches]
    everyone = [_features_of_survivors(never, batch) for batch in batches]
    contenders: dict[str, Callable[[], object]] = {
        "plain": lambda: [plain(batch) for batch in batches],
        "all_exits": lambda: [all_exits_loop(network, policy, batch) for batch in batches],
        "adaptive": lambda: [runner.run(batch) for batch in batches],
        "never_exit": lambda: [never.run(batch) for batch in batches],
        "stages": partial(_run_parts, runner, [part for given in survivors for part in given]),
    }
    for k in range(network.num_exits):
        contenders[f"stage_{k}"] = partial(_run_parts, runner, [given[k] for given in everyone])
    return contenders


class _AskButStay(Policy):
    """Asks another policy at every exit that is on and lets nobody leave before the final one."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.num_exits = policy.num_exits

    def decide(self, exit_index: int, output: Tensor, state: State, setting: Setting) -> Decision:
        leave_B, confidence_B, state = self.policy.decide(exit_index, output, state, setting)
        if exit_index < self.num_exits - 1:
            leave_B = torch.zeros_like(leave_B)
        return leave_B, confidence_B, state

    def setting(self, exit_index: int) -> Setting:
        return self.policy.setting(exit_index)


def _features_of_survivors(runner: AdaptiveRunner, batch: Tensor) -> list[tuple[int, Features]]:
    """What each stage that runs is given, when the batch runs early."""
    last_exit_B = runner.run(batch).exit_index
    features: Features = (batch,)
    given = []
    for k in range(int(last_exit_B.max()) + 1):
        given.append((k, features))
        features = runner.network.run_stage(k, features)
        stay_B = (last_exit_B > k).nonzero()[:, 0]
        if len(stay_B) < len(last_exit_B):
            features = runner.network.take(features, stay_B)
            last_exit_B = last_exit_B[stay_B]
    return given


def _run_parts(runner: AdaptiveRunner, parts: Sequence[tuple[int, Features]]) -> None:
    """Stages with their heads, unless these are off.

    Nothing is kept, as a runner keeps nothing: results that pile up would make every part pay for
    memory of its own.
    """
    for k, given in parts:
        features = runner.network.run_stage(k, given)
        if not runner.policy.is_off(k):
            runner.network.run_exit(k, features)
