"""Running a network so that what is not needed does not run.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from offramp.calibration.sweep import ChosenThreshold
from offramp.calibration.thresholds import Calibration
from offramp.errors import InvalidArgumentError, NotCalibratedError
from offramp.inference.exit_steps import engine_for, exit_steps
from offramp.inference.halting import HaltingRunner
from offramp.inference.skipping import SkipRunner
from offramp.model.inputs import Given, as_inputs, explained
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.policy.policies import Policy
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy, RoutingPolicy
from offramp.results import AdaptiveResult
from offramp.routing.halting import HaltingNetwork
from offramp.routing.skip import SkipNetwork
from offramp.runtime.deadline import Deadline
from offramp.runtime.loop import run_steps, time_steps
from offramp.zoo import Network


class Runner(Protocol):
    """Whatever answers a batch, spending on each sample what it needs."""

    def run(self, *inputs: Any) -> AdaptiveResult[Any]:
        """Answer a batch of inputs, each with its batch axis first."""
        ...


class AdaptiveRunner:
    """Runs stage after stage, lets samples leave, and goes on with the survivors only.

    Args:
        network: The network; it is put in evaluation mode.
        policy: Who leaves where; a calibration stands for its policy.
    Attributes:
        step_ms: What :meth:`time_steps` measured; None before.
    Raises:
        NotCalibratedError: If there is no policy, or it is for another number of exits.
        InvalidArgumentError: If the network or the policy is of another kind.
    """

    def __init__(self, network: MultiExitNetwork, policy: Policy | Calibration | None) -> None:
        if not isinstance(network, MultiExitNetwork):
            raise InvalidArgumentError(
                "Expected a network with exits, as add_exits makes of a backbone. "
                f"Got a {type(network).__name__}."
            )
        if isinstance(policy, Calibration):
            policy = policy.policy
        if policy is None:
            raise NotCalibratedError(
                "Running early needs a policy and none was set. Choose one: offramp calibrate RUN, "
                f"or {'DensePolicy' if network.is_dense else 'ThresholdPolicy'}((0.9, ...))."
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
                costs = self.network.costs(*(t.new_zeros((1, *t.shape[1:])) for t in inputs))
            exit_macs = costs.with_decisions(self.policy.decision_macs).exit_macs(
                self.policy.off_exits
            )
            self._macs_by_size[size] = torch.tensor(exit_macs, device=inputs[0].device)
        return self._macs_by_size[size]


TorchRunner = AdaptiveRunner | SkipRunner | HaltingRunner
"""A runner of each family of networks."""


def make_runner(
    network: Network, policy: Policy | RoutingPolicy | Calibration | ChosenThreshold | None
) -> TorchRunner:
    """Make the runner that fits a network and its policy.

    Args:
        network: The network; it is put in evaluation mode.
        policy: Who leaves where, which blocks run, or when a token halts; what chose one stands
            for it.
    Returns:
        The runner.
    Raises:
        NotCalibratedError: If there is no policy, or it is for another network.
    """
    if isinstance(policy, Calibration):
        policy = policy.policy
    if isinstance(network, SkipNetwork) and isinstance(policy, GatePolicy | ChosenThreshold):
        return SkipRunner(network, policy)
    if isinstance(network, HaltingNetwork) and isinstance(policy, HaltingPolicy | ChosenThreshold):
        return HaltingRunner(network, policy)
    if isinstance(network, MultiExitNetwork) and not isinstance(
        policy, RoutingPolicy | ChosenThreshold
    ):
        return AdaptiveRunner(network, policy)
    raise NotCalibratedError(
        f"Expected a policy for a {type(network).__name__}. Got a {type(policy).__name__}. "
        "Choose one for this network: offramp calibrate RUN"
    )
