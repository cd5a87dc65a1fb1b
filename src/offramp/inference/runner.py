"""Running a network so that what is not needed does not run.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from offramp.errors import NotCalibratedError
from offramp.measure.cost import ExitCosts
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.policy.policies import Policy, State
from offramp.results import AdaptiveResult


class Runner(Protocol):
    """Whatever answers a batch, spending on each sample what it needs."""

    def run(self, *inputs: Tensor) -> AdaptiveResult[Tensor]:
        """Answer a batch of inputs, each with its batch axis first."""
        ...


class AdaptiveRunner:
    """Runs stage after stage, lets samples leave, and goes on with the survivors only.

    Args:
        network: The network; it is put in evaluation mode.
        policy: Who leaves where.
    Raises:
        NotCalibratedError: If there is no policy, or it is for another number of exits.
    """

    def __init__(self, network: MultiExitNetwork, policy: Policy | None) -> None:
        if policy is None:
            raise NotCalibratedError(
                "Running early needs a policy and none was set. Choose one: offramp calibrate RUN, "
                "or ThresholdPolicy((0.9, ...))."
            )
        if policy.num_exits != network.num_exits:
            raise NotCalibratedError(
                f"Expected a policy for the network's {network.num_exits} exits. "
                f"Got one for {policy.num_exits}. Calibrate it for this network."
            )
        self.network = network.eval()
        self.policy = policy
        self._off = frozenset(k for k in range(network.num_exits) if policy.is_off(k))
        self._costs: dict[tuple[torch.Size, ...], ExitCosts] = {}

    @torch.inference_mode()
    def run(self, *inputs: Tensor) -> AdaptiveResult[Tensor]:
        """Answer a batch.

        Args:
            inputs: The network's inputs, each with the batch axis first, on its device.
        Returns:
            Logits, exit, confidence and MACs of each sample, in the order of the batch.
        """
        batch_size = len(inputs[0])
        if batch_size == 1:
            output, confidence_B, exit_index = self._run_one(inputs)
            exit_index_B = torch.full((1,), exit_index, device=output.device)
        else:
            output, confidence_B, exit_index_B = self._run_many(inputs)
        exit_macs = self._exit_costs(inputs).exit_macs(self._off) if batch_size else (0,)
        return AdaptiveResult(
            output=output,
            exit_index=exit_index_B,
            confidence=confidence_B,
            macs=torch.tensor(exit_macs, device=output.device)[exit_index_B],
        )

    def _run_one(self, features: Features) -> tuple[Tensor, Tensor, int]:
        """A single sample needs no indexing: it leaves or goes on."""
        state: State = ()
        for k in range(self.network.num_exits):
            features = self.network.run_stage(k, features)
            if k in self._off:
                continue
            output = self.network.run_exit(k, features)
            leave_B, confidence_B, state = self.policy.step(k, output, state)
            if k == self.network.num_exits - 1 or bool(leave_B):
                break
        return output, confidence_B, k

    def _run_many(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """Compact the batch to the survivors after every exit; put the answers back in order."""
        rows_B = torch.arange(len(features[0]), device=features[0].device)
        state: State = ()
        rows, outputs, confidences, counts = [], [], [], [0] * self.network.num_exits
        for k in range(self.network.num_exits):
            features = self.network.run_stage(k, features)
            if k in self._off:
                continue
            output = self.network.run_exit(k, features)
            leave_B, confidence_B, state = self.policy.step(k, output, state)
            # Survivors first, leavers last, so that reading their number is the only wait.
            order_B = leave_B.argsort(stable=True)
            counts[k] = len(rows_B) if k == self.network.num_exits - 1 else int(leave_B.sum())
            stay_B, go_B = order_B.tensor_split([len(rows_B) - counts[k]])
            if counts[k] == 0:
                continue
            rows.append(rows_B[go_B])
            outputs.append(output[go_B])
            confidences.append(confidence_B[go_B])
            if counts[k] == len(rows_B):
                break
            rows_B = rows_B[stay_B]
            features = tuple(tensor.index_select(0, stay_B) for tensor in features)
            state = tuple(tensor.index_select(0, stay_B) for tensor in state)
        if not rows:  # an empty batch
            return output, confidence_B, rows_B
        exit_index_B = torch.arange(len(counts), device=rows_B.device).repeat_interleave(
            torch.tensor(counts, device=rows_B.device)
        )
        position_B = torch.cat(rows).argsort()
        return (
            torch.cat(outputs)[position_B],
            torch.cat(confidences)[position_B],
            exit_index_B[position_B],
        )

    def _exit_costs(self, inputs: tuple[Tensor, ...]) -> ExitCosts:
        shapes = tuple(tensor.shape[1:] for tensor in inputs)
        if shapes not in self._costs:
            self._costs[shapes] = self.network.costs(*inputs)
        return self._costs[shapes]
