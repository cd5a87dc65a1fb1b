"""The family of networks whose tokens halt: those that have halted are gone.

Shapes: ``B`` batch, ``T`` tokens, ``N`` tokens of all samples together, ``D`` width of a token,
``L`` layers, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.families.family import Family, TorchRunner, Words, settled
from offramp.families.packing import Packing
from offramp.measure.agreement import DECISION_TOLERANCE, Reference
from offramp.model.inputs import Given, as_inputs, explained
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.policy.choice import Choice
from offramp.policy.confidence import max_probability_confidence
from offramp.policy.routing_policy import HaltingPolicy
from offramp.results import AdaptiveResult
from offramp.routing.halting import HaltingCosts, HaltingNetwork, advance
from offramp.runtime.padding import require_first_tokens


class HaltingRunner(TorchRunner[HaltingNetwork, HaltingPolicy]):
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
        self, network: HaltingNetwork, policy: HaltingPolicy | Choice | None = None
    ) -> None:
        self.network, self.policy = settled(
            network, policy, HaltingNetwork, HaltingPolicy(), "add_halting"
        )
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
        answer_BD = torch.zeros_like(network.read(x_BTD[:, 0]))
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
            if network.readout is None:
                class_BD = (
                    x_ND.index_select(0, class_B) * weight_N.index_select(0, class_B)[:, None]
                )
                answer_BD.index_add_(0, rows_B, class_BD)
            else:  # every token's, and the rest of it where its sample ends
                is_over_N = step.halts[class_B][packing.sample_N]
                weight_N = torch.where(is_over_N, 1 - total_N, weight_N)
                share_ND = network.read(x_ND) * weight_N[:, None]
                answer_BD.index_add_(0, rows_B[packing.sample_N], share_ND)
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
    """Take what goes on: no token that halts, and no sample whose class token does."""
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


@torch.no_grad()
def masked_pass(
    network: HaltingNetwork,
    threshold: float,
    inputs: Features,
    first_layers: Sequence[int] | None = None,
) -> Reference:
    """Run every layer on every token, and mask those that have halted."""
    expected = network(*inputs, threshold=threshold)

    def near_BL() -> Tensor:
        is_near_BTL: Tensor = expected.runs & (
            (expected.total - threshold).abs() < DECISION_TOLERANCE
        )
        return is_near_BTL.any(1)

    return token_reference(expected.logits, expected.tokens, near_BL, first_layers)


def token_reference(
    output: Tensor,
    tokens_BL: Tensor,
    near_BL: Callable[[], Tensor],
    first_layers: Sequence[int] | None = None,
) -> Reference:
    """Describe answers where tokens were masked, in any engine."""
    steps = list(range(tokens_BL.shape[1]) if first_layers is None else first_layers)

    def is_near_BS() -> Tensor:
        # Rounding may decide in the step before the ways part; later scores are of other tokens.
        in_step = [part_BS.any(1) for part_BS in near_BL().tensor_split(steps[1:], dim=1)]
        return torch.stack([torch.zeros_like(in_step[0]), *in_step[:-1]], 1)

    return Reference(
        output=output,
        exit_index=torch.zeros_like(tokens_BL[:, 0]),
        num_exits=1,
        work=tokens_BL,
        columns=steps,
        is_near=is_near_BS,
    )


def _whole(
    network: HaltingNetwork,
) -> tuple[Callable[..., tuple[Tensor]], MultiExitNetwork]:
    """Its logits with a threshold of 1, at which tokens stay longest, and the plain network."""

    def say(*inputs: Tensor) -> tuple[Tensor]:
        return (network(*inputs, threshold=1.0).logits,)

    return say, network.without_halting()


def _figures(evaluation: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    every, *later = evaluation["tokens"]["per_layer"]
    return [mean / every for mean in later], [every]


def _parts_table(evaluation: Mapping[str, Any]) -> list[str]:
    means = enumerate(evaluation["tokens"]["per_layer"], start=1)
    rows = [f"| {number} | {mean:.1f} |" for number, mean in means]
    return ["| layer | tokens in it |", "|---|---|", *rows]


@torch.no_grad()
def _depths(network: HaltingNetwork, policy: HaltingPolicy, images: Tensor) -> Tensor:
    depth_BT: Tensor = network(images, threshold=policy.threshold).depth
    return depth_BT


HALTING = Family(
    name="halting",
    words=Words(
        kind="networks whose tokens halt",
        maker="add_halting",
        does="drops tokens",
        ability="drops each token of an input as soon as it is finished",
        tag="a-vit",
        heading="When a token halts",
        rule="A token halts where its scores add up to at least {policy.threshold:.4f}.",
        use=(
            "print(result.output.argmax(-1), result.tokens.sum(1), result.macs)"
            "  # class, tokens and MACs run"
        ),
        share="tokens",
        way="dropping tokens",
        whole_network="the network with a threshold of 1",
        less="dropping tokens that have halted",
        less_metric="with tokens dropped",
        whole="with a threshold of 1, at which tokens stay longest",
        whole_metric="with a threshold of 1",
    ),
    network=HaltingNetwork,
    policy=HaltingPolicy,
    as_trained=HaltingPolicy(),
    runner=HaltingRunner,
    reference=lambda network, policy, inputs: masked_pass(network, policy.threshold, inputs),
    whole=_whole,
    never=lambda policy: HaltingPolicy(1.0),
    thresholds=HaltingPolicy.tried,
    settings="halting",
    figures=_figures,
    parts_table=_parts_table,
    depths=_depths,
)
