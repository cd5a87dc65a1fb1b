"""The family of networks with exits: samples leave, and the stages behind run without them.

Shapes: ``B`` batch, ``C`` classes, ``K`` exits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from offramp.errors import InvalidArgumentError, NotCalibratedError
from offramp.families.exit_steps import engine_for, exit_steps
from offramp.families.family import Contenders, Family, TorchRunner, Words
from offramp.measure.agreement import Reference, is_near
from offramp.model.inputs import Given, as_inputs, explained
from offramp.model.multi_exit import Features, MultiExitNetwork, as_features
from offramp.policy.choice import Choice
from offramp.policy.policies import Decision, Policy, Setting, State, ThresholdedPolicy
from offramp.policy.rules import RULES
from offramp.results import AdaptiveResult
from offramp.runtime.deadline import Deadline
from offramp.runtime.loop import run_steps, time_steps

ExitRunner = TorchRunner[MultiExitNetwork, Policy]


class AdaptiveRunner(ExitRunner):
    """Runs stage after stage, lets samples leave, and goes on with the survivors only.

    Args:
        network: The network; it is put in evaluation mode.
        policy: The policy of its exits; a calibration stands for its policy.
    Attributes:
        step_ms: What :meth:`time_steps` measured; None before.
    Raises:
        NotCalibratedError: If there is no policy, or it is for another number of exits.
        InvalidArgumentError: If the network or the policy is of another kind.
    """

    def __init__(self, network: MultiExitNetwork, policy: Policy | Choice | None) -> None:
        if not isinstance(network, MultiExitNetwork):
            raise InvalidArgumentError(
                "Expected a network with exits, as add_exits makes of a backbone. "
                f"Got a {type(network).__name__}."
            )
        if isinstance(policy, Choice):
            policy = policy.as_policy()
        if policy is None:
            raise NotCalibratedError(
                "Running early needs a policy and none was set. Choose one: offramp calibrate RUN, "
                f"or {RULES[network.outputs.name].kind.__name__}((0.9, ...))."
            )
        if not isinstance(policy, Policy):
            raise InvalidArgumentError(
                "Expected a policy for exits, or a calibration that chose one. "
                f"Got a {type(policy).__name__}."
            )
        if policy.num_exits != network.num_exits:
            raise NotCalibratedError(
                f"Expected a policy for the network's {network.num_exits} exits. "
                f"Got one for {policy.num_exits}. Calibrate it for this network."
            )
        self.network = network.eval()
        self.policy = policy
        self._steps = exit_steps(network, policy)
        self.step_ms: tuple[float, ...] | None = None
        self._macs_by_size: dict[Hashable, Tensor] = {}

    @torch.no_grad()
    def run(self, *inputs: Given, deadline_ms: float | None = None) -> AdaptiveResult[Tensor]:
        """Answer a batch.

        Args:
            inputs: The network's inputs, each with the batch axis first, on its device; or all of
                them as a tuple, or as a dict by name.
            deadline_ms: A step (the stages up to an exit that is on) that would end later than so
                many milliseconds after the call, by what :meth:`time_steps` measured, is not
                started: whoever is left gets the answer of the last exit before it. The first
                step always runs.
        Returns:
            Logits, exit, confidence and MACs of each sample, in the order of the batch.
        Raises:
            InvalidArgumentError: If the deadline is not above 0, or the steps were not timed, or
                the inputs are of the wrong kind.
            ShapeError: If the network cannot take the inputs.
        """
        deadline = None if deadline_ms is None else Deadline(deadline_ms, self.step_ms)
        if self.network.training:  # a caller may have trained it since
            self.network.eval()
        features = self.network.trimmed(as_inputs(inputs, self.network))
        with explained(features, self.network.input_specs):
            part = run_steps(self._steps, (features, ()), engine_for(features), deadline=deadline)
        return AdaptiveResult(
            output=part.output,
            exit_index=part.exit_index,
            confidence=part.confidence,
            macs=self._macs(features, part.exit_index),
        )

    @torch.no_grad()
    def time_steps(self, *inputs: Given) -> tuple[float, ...]:
        """Measure what each step takes, so that a deadline can be kept.

        Args:
            inputs: A batch like those to come.
        Returns:
            Milliseconds of each step, nobody leaving: medians, kept in ``step_ms``.
        """
        if self.network.training:
            self.network.eval()
        features = self.network.trimmed(as_inputs(inputs, self.network))
        self.step_ms = time_steps(self._steps, (features, ()), engine_for(features))
        return self.step_ms

    def _macs(self, inputs: Features, exit_index_B: Tensor) -> Tensor:
        """MACs of each sample, by the exit it left by and, where it has one, its own length."""
        if self.network.ragged is None:
            size = tuple(tensor.shape[1:] for tensor in inputs)
            return self._exit_macs(size, inputs).index_select(0, exit_index_B)
        lengths_B = self.network.ragged.lengths(inputs)
        macs_B = torch.empty_like(exit_index_B)
        for length in torch.unique(lengths_B).tolist():
            here_B = lengths_B == length
            macs_B[here_B] = self._exit_macs(length, inputs)[exit_index_B[here_B]]
        return macs_B

    def _exit_macs(self, size: Hashable, inputs: Features) -> Tensor:
        """MACs of a sample that leaves at each exit, shape (K,); counted once per size."""
        if size not in self._macs_by_size:
            if isinstance(size, int):
                costs = self.network.costs_at(size, inputs)
            else:
                one = (t[:1] if len(t) else t.new_zeros((1, *t.shape[1:])) for t in inputs)
                costs = self.network.costs(*one)
            exit_macs = costs.with_decisions(self.policy.decision_macs).exit_macs(
                self.policy.off_exits
            )
            self._macs_by_size[size] = torch.tensor(exit_macs, device=inputs[0].device)
        return self._macs_by_size[size]


def all_exits_loop(
    network: MultiExitNetwork, policy: Policy, inputs: Tensor | Features
) -> tuple[Tensor, Tensor, Tensor]:
    """Run every stage and head on every sample, then choose: output, exits_B, confidence_KB."""
    outputs = network(*as_features(inputs))
    state: State = ()
    rows = torch.arange(len(outputs[0]), device=outputs[0].device)
    chosen = torch.full_like(rows, -1)
    confidences = []
    for k, output in enumerate(outputs):
        if policy.is_off(k):  # its head does not run, and the policy never hears of it
            confidences.append(output.new_full((len(output),), math.nan))
            continue
        leave_B, confidence_B, state = policy.step(k, output, state)
        confidences.append(confidence_B)
        chosen = torch.where((chosen < 0) & leave_B, k, chosen)
    stacked = torch.stack(outputs)
    return stacked[chosen, rows], chosen, torch.stack(confidences)


@torch.no_grad()
def _reference(network: MultiExitNetwork, policy: Policy, inputs: Features) -> Reference:
    output, chosen_B, confidence_KB = all_exits_loop(network, policy, inputs)
    thresholds = policy.thresholds if isinstance(policy, ThresholdedPolicy) else ()
    return Reference(
        output=output,
        exit_index=chosen_B,
        num_exits=network.num_exits,
        work=chosen_B[:, None],
        is_near=partial(is_near, confidence_KB, thresholds),
    )


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


def _features_of_survivors(runner: ExitRunner, batch: Tensor) -> list[tuple[int, Features]]:
    """Collect the inputs of each stage that runs, when the batch runs early."""
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


def _run_parts(runner: ExitRunner, parts: Sequence[tuple[int, Features]]) -> None:
    """Stages with their heads, unless these are off.

    Nothing is kept, as a runner keeps nothing: results that pile up would make every part pay for
    memory of its own.
    """
    for k, given in parts:
        features = runner.network.run_stage(k, given)
        if not runner.policy.is_off(k):
            runner.network.run_exit(k, features)


def _stages(runner: ExitRunner, batches: Sequence[Tensor]) -> Contenders:
    """Stages with their heads: all on those who reach them, and each on everybody."""
    never = AdaptiveRunner(runner.network, _AskButStay(runner.policy))
    survivors = [_features_of_survivors(runner, batch) for batch in batches]
    everyone = [_features_of_survivors(never, batch) for batch in batches]
    contenders: dict[str, Callable[[], object]] = {
        "stages": partial(_run_parts, runner, [part for given in survivors for part in given])
    }
    for k in range(runner.network.num_exits):
        contenders[f"stage_{k}"] = partial(_run_parts, runner, [given[k] for given in everyone])
    return contenders


EXITS = Family(
    name="exits",
    words=Words(
        kind="networks with exits",
        maker="add_exits",
        does="leaves by exits",
        ability="can stop early{exits}",
        tag="early-exit",
        heading="Who leaves where",
        rule="",
        use=(
            "print(result.output.argmax(1), result.exit_index, result.macs)"
            "  # class, exit, MACs that ran"
        ),
        share="",
        way="early exit",
        whole_network="the final exit",
        less="leaving early",
        less_metric="with early exit",
        whole="every sample to the final exit",
        whole_metric="of the final exit alone",
    ),
    network=MultiExitNetwork,
    policy=Policy,
    runner=AdaptiveRunner,
    reference=_reference,
    whole=lambda network: (network, network),
    never=_AskButStay,
    stages=_stages,
)
