"""The steps of a network with exits in torch, for the loop that bundles run by too.

Shapes: ``B`` batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.model.multi_exit import Features, MultiExitNetwork, take_samples
from offramp.policy.policies import Policy, State

Carried = tuple[Features, State]


@dataclass(frozen=True)
class ExitStep:
    """The stages up to an exit that is on, and its decision."""

    network: MultiExitNetwork
    policy: Policy
    stages: range
    exit_index: int
    is_final: bool

    def run(self, carried: Carried) -> tuple[Tensor, Tensor, Tensor, Carried]:
        """See :meth:`offramp.runtime.loop.Step.run`."""
        features, state = carried
        for stage in self.stages:
            features = self.network.run_stage(stage, features)
        output = self.network.run_exit(self.exit_index, features)
        leave_B, confidence_B, state = self.policy.step(self.exit_index, output, state)
        return output, confidence_B, leave_B, (features, state)

    def take(self, carried: Carried, rows: Tensor) -> Carried:
        """See :meth:`offramp.runtime.loop.Step.take`."""
        features, state = carried
        return self.network.take(features, rows), take_samples(state, rows)


def exit_steps(network: MultiExitNetwork, policy: Policy) -> list[ExitStep]:
    """Cut a network into steps; exits that are off end none, and their heads do not run."""
    steps, start = [], 0
    for k in range(network.num_exits):
        if not policy.is_off(k):
            is_final = k == network.num_exits - 1
            steps.append(ExitStep(network, policy, range(start, k + 1), k, is_final))
            start = k + 1
    return steps


class _TorchEngine:
    """Indexes tensors; see :class:`~offramp.runtime.loop.Engine`."""

    nobody = torch.empty(0, dtype=torch.int64)

    def rows(self, output: Tensor) -> Tensor:
        return torch.arange(len(output), device=output.device)

    def stayers(self, leave: Tensor) -> Tensor:
        return (~leave).nonzero()[:, 0]  # the one wait for the device at an exit

    def take(self, rows: Tensor, places: Tensor) -> Tensor:
        return rows.index_select(0, places)

    def own(self, values: Tensor) -> Tensor:
        return values.clone()

    def put(self, into: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        return into.index_copy_(0, rows, values)

    def last(self, reached: Sequence[tuple[int, Tensor]]) -> Tensor:
        (number, rows_B), *later = reached
        last_B = torch.full_like(rows_B, number)
        for number, rows in later:
            last_B.index_fill_(0, rows, number)
        return last_B


class _SingleEngine(_TorchEngine):
    """For a batch of one, which needs no indexing: it leaves or goes on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def rows(self, output: Tensor) -> Tensor:
        return _ONE_ROW

    def stayers(self, leave: Tensor) -> Tensor:
        return self.nobody if bool(leave) else _ONE_ROW

    def own(self, values: Tensor) -> Tensor:
        return values

    def put(self, into: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        return values

    def last(self, reached: Sequence[tuple[int, Tensor]]) -> Tensor:
        return torch.full((1,), reached[-1][0], device=self._device)


_ONE_ROW = torch.zeros(1, dtype=torch.int64)
_MANY = _TorchEngine()


def engine_for(inputs: Features) -> _TorchEngine:
    """The engine for a batch of this size."""
    return _SingleEngine(inputs[0].device) if len(inputs[0]) == 1 else _MANY
