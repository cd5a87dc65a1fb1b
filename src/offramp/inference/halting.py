"""Running a network whose tokens halt so that those that have halted are gone.

Shapes: ``B`` batch, ``T`` tokens, ``N`` tokens of all samples together, ``D`` width of a token,
``L`` layers, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from offramp.calibration.sweep import ChosenThreshold
from offramp.errors import InvalidArgumentError
from offramp.inference.packing import Packing
from offramp.model.inputs import Given, as_inputs, explained
from offramp.model.multi_exit import Features
from offramp.policy.confidence import max_probability_confidence
from offramp.policy.routing_policy import HaltingPolicy
from offramp.results import AdaptiveResult
from offramp.routing.halting import HaltingCosts, HaltingNetwork, advance
from offramp.runtime.padding import require_first_tokens


class HaltingRunner:
    """Runs each layer on the tokens that have not halted, and on no sample that is answered.

    The tokens of a batch lie one after the other, without padding; attention stays within each
    sample.

    Args:
        network: The network; it is put in evaluation mode.
        policy: When a token halts, or what :func:`~offramp.calibrate` chose; as in training
            if None.
    Raises:
        InvalidArgumentError: If the network or the policy is of another kind.
    """

    def __init__(
        self, network: HaltingNetwork, policy: HaltingPolicy | ChosenThreshold | None = None
    ) -> None:
        if not isinstance(network, HaltingNetwork):
            raise InvalidArgumentError(
                f"Expected a HaltingNetwork, as add_halting makes. Got a {type(network).__name__}."
            )
        if isinstance(policy, ChosenThreshold):
            policy = HaltingPolicy(policy.threshold)
        if not isinstance(policy, HaltingPolicy | None):
            raise InvalidArgumentError(
                f"Expected a HaltingPolicy, or what calibrate chose. Got a {type(policy).__name__}."
            )
        self.network = network.eval()
        self.policy = policy or HaltingPolicy()
        self._costs_by_size: dict[Hashable, HaltingCosts] = {}

    @torch.no_grad()
    def run(self, *inputs: Given) -> AdaptiveResult[Tensor]:
        """Answer a batch.

        Args:
            inputs: The network's inputs, each with the batch axis first, on its device; or all of
                them as a tuple, or as a dict by name.
        Returns:
            Logits, the largest class probability, MACs and tokens in each layer of each sample, in
            the order of the batch; every sample leaves by the only exit.
        Raises:
            ShapeError: If a sample begins with padding, or the network cannot take the inputs.
            InvalidArgumentError: If the inputs are of the wrong kind.
        """
        if self.network.training:  # a caller may have trained it since
            self.network.eval()
        given = self.network.trimmed(as_inputs(inputs, self.network))
        with explained(given, self.network.input_specs):
            x_BTD, is_valid_BT = self.network.embed(*given)
            if self.network.ragged is not None:
                require_first_tokens(is_valid_BT.cpu().numpy())
            answer_BD, tokens_BL = self._run_layers(x_BTD, is_valid_BT)
            logits_BC = self.network.head(answer_BD)
        return AdaptiveResult(
            output=logits_BC,
            exit_index=torch.zeros(len(logits_BC), dtype=torch.int64, device=logits_BC.device),
            confidence=max_probability_confidence(logits_BC),
            macs=self._costs(given).macs(tokens_BL),
            tokens=tokens_BL,
        )

    def _run_layers(self, x_BTD: Tensor, is_valid_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The accumulated class token of each sample, and the tokens that ran each layer."""
        network, num_layers = self.network, self.network.num_layers
        answer_BD = torch.zeros_like(x_BTD[:, 0])
        tokens_BL = is_valid_BT.new_zeros((len(x_BTD), num_layers), dtype=torch.int64)
        running = _start(x_BTD, is_valid_BT if network.ragged else None)
        for index, layer in enumerate(network.parts().layers):
            if running is None:
                break
            x_ND, total_N, rows_B, packing = running
            tokens_BL[rows_B, index] = packing.lengths_B
            context_ND = packing.attend(*layer.project(x_ND), layer.num_heads)
            x_ND = layer.complete(x_ND, context_ND)
            step = advance(total_N, network.score(x_ND), self.policy.threshold)
            is_last = index == num_layers - 1
            weight_N = 1 - total_N if is_last else step.weight
            class_B = packing.starts_B
            class_BD = x_ND.index_select(0, class_B) * weight_N.index_select(0, class_B)[:, None]
            answer_BD.index_add_(0, rows_B, class_BD)
            if not is_last:
                running = _drop(_Running(x_ND, step.total, rows_B, packing), step.halts)
        return answer_BD, tokens_BL

    def _costs(self, inputs: Features) -> HaltingCosts:
        """Of a token and of a pair of them, which hold for samples of any length."""
        size = None if self.network.ragged else tuple(tensor.shape[1:] for tensor in inputs)
        if size not in self._costs_by_size:
            self._costs_by_size[size] = self.network.costs(*inputs)
        return self._costs_by_size[size]


class _Running(NamedTuple):
    """The tokens that run, of the samples that are not answered.

    Attributes:
        x_ND: The tokens, sample after sample, the class token first.
        total_N: Sum of each token's scores.
        rows_B: Number of each sample in the batch.
        packing: Where each sample's tokens lie.
    """

    x_ND: Tensor
    total_N: Tensor
    rows_B: Tensor
    packing: Packing


def _start(x_BTD: Tensor, is_valid_BT: Tensor | None) -> _Running | None:
    """All tokens but padding, if there is any; None where there is nothing else."""
    rows_B = torch.arange(len(x_BTD), device=x_BTD.device)
    if is_valid_BT is None:
        x_ND, lengths_B = x_BTD.flatten(0, 1), torch.full_like(rows_B, x_BTD.shape[1])
    else:
        x_ND, lengths_B = x_BTD[is_valid_BT], is_valid_BT.sum(1)
    return _packed(x_ND, torch.zeros_like(x_ND[:, 0]), rows_B, lengths_B)


def _drop(running: _Running, halts_N: Tensor) -> _Running | None:
    """What goes on: no token that halts, and no sample whose class token does."""
    x_ND, total_N, rows_B, packing = running
    stays_N = ~(halts_N | halts_N[packing.starts_B][packing.sample_N])
    kept = stays_N.nonzero()[:, 0]  # one wait for the device; another for the lengths
    if len(kept) == len(x_ND):
        return running
    ends_B = stays_N.cumsum(0)[packing.starts_B + packing.lengths_B - 1]
    lengths_B = torch.diff(ends_B, prepend=ends_B.new_zeros(1))
    return _packed(x_ND.index_select(0, kept), total_N.index_select(0, kept), rows_B, lengths_B)


def _packed(x_ND: Tensor, total_N: Tensor, rows_B: Tensor, lengths_B: Tensor) -> _Running | None:
    """Leave out samples without tokens; None if that are all."""
    lengths = lengths_B.tolist()
    if not any(lengths):
        return None
    if not all(lengths):
        here = lengths_B.nonzero()[:, 0]
        rows_B, lengths = rows_B[here], [length for length in lengths if length]
    return _Running(x_ND, total_N, rows_B, Packing(lengths, x_ND.device))
