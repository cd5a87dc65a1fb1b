"""A-ViT: a transformer whose tokens halt, each after as many layers as it needs.

After every layer a token's score says how much of it is finished. A token whose scores add up to
the threshold has halted: it is neither query nor key any more, and never comes back. The answer
is the sum of the class token after each layer, weighted by its scores; once the class token
halts, the answer is complete and the whole sample leaves.

Shapes: ``B`` batch, ``T`` tokens, ``D`` width of a token, ``L`` layers, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from offramp.errors import BackboneCutError, InvalidArgumentError
from offramp.measure.cost import count_macs, evaluation_mode, require_samples
from offramp.measure.outputs import SaysClasses
from offramp.model.inputs import Given, InputSpec, as_inputs, example_inputs
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.model.proof import find_difference
from offramp.model.ragged import Ragged
from offramp.routing.layers import TransformerLayer, attend
from offramp.routing.own import own_parts
from offramp.routing.token_parts import (
    MarkedEmbed,
    MarkedLayer,
    Readout,
    TokenParts,
    as_one_exit,
    example_of,
    take_apart,
)

DEFAULT_THRESHOLD = 0.99
"""Sum of scores at which a token halts in training: the paper's 1 - 0.01."""


class HaltingOutput(NamedTuple):
    """The result of a masked pass over all layers.

    Attributes:
        logits: Raw logits, shape (B, C).
        weight: Of each token after each layer in its own accumulated state, shape (B, T, L), with
            gradient; sums to one over the layers, is 0 where the token did not run, and 0
            throughout for padding.
        runs: Which tokens ran each layer, shape (B, T, L), bool.
        ponder: Layers that each token ran, and its remainder, which alone carries a gradient,
            shape (B, T); 0 for padding.
        valid: Which tokens are no padding, shape (B, T), bool.
        total: Sum of each token's scores after each layer, which decides whether it halts there,
            shape (B, T, L), without gradient; 0 where the token did not run.
    """

    logits: Tensor
    weight: Tensor
    runs: Tensor
    ponder: Tensor
    valid: Tensor
    total: Tensor

    @property
    def tokens(self) -> Tensor:
        """Tokens of each sample that ran each layer, shape (B, L), int64; 0 once it has left."""
        return self.runs.sum(1)

    @property
    def depth(self) -> Tensor:
        """Layers that each token ran, shape (B, T), int64."""
        return self.runs.sum(2)


@dataclass(frozen=True, kw_only=True)
class HaltingCosts:
    """MACs per sample of a network whose tokens halt, part by part.

    Attributes:
        fixed_macs: What always runs: embedding and head.
        token_macs: Each layer, per token that runs it.
        pair_macs: Each layer, per pair of tokens that run it: attention's quadratic part.
        plain_macs: The plain network, every token in every layer; the mean over the samples where
            they are of unequal length.
    """

    fixed_macs: int
    token_macs: tuple[int, ...]
    pair_macs: tuple[int, ...]
    plain_macs: int

    def macs(self, tokens_BL: Tensor) -> Tensor:
        """Return the MACs of each sample."""
        tokens_BL = tokens_BL.long()
        token_macs_L = torch.tensor(self.token_macs, device=tokens_BL.device)
        pair_macs_L = torch.tensor(self.pair_macs, device=tokens_BL.device)
        return self.fixed_macs + (tokens_BL * (token_macs_L + tokens_BL * pair_macs_L)).sum(1)

    def macs_of_length(self, lengths_B: Tensor) -> Tensor:
        """Return the MACs of each sample in the plain network."""
        return self.macs(lengths_B[:, None].expand(-1, len(self.token_macs)))


class HaltingNetwork(SaysClasses, nn.Module):
    """A transformer whose tokens halt.

    ``forward`` computes every token in every layer and masks those that have halted: for
    training, and to compare with. Dropping them is the business of a runner.

    Args:
        embed: From the inputs to tokens, shape (B, T, D), of which the first is the class token,
            and which of them are no padding, shape (B, T), bool.
        layers: Its layers, in order.
        head: From the accumulated class token, shape (B, D), to logits; holds the final norm.
        gate_scale: Factor on a token's first coordinate in its score.
        gate_center: What is taken off after that.
        ragged: Where padding is marked in the inputs; None where there is none.
        readout: What the answer is made of; None for the class token alone. Without a class token
            the first one ends its sample: where it halts, the rest of every weight is given.
    Attributes:
        num_exits: 1: tokens leave inside, and every sample is answered once.
    """

    num_exits = 1
    num_classes: int | None = None
    input_specs: tuple[InputSpec, ...] = ()

    def __init__(
        self,
        embed: nn.Module,
        layers: Sequence[TransformerLayer],
        head: nn.Module,
        *,
        gate_scale: float = 10.0,
        gate_center: float = 30.0,
        ragged: Ragged | None = None,
        readout: Readout | None = None,
    ) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        if readout is not None:
            self.embed = MarkedEmbed(embed, readout)
            self.layers = nn.ModuleList(MarkedLayer(each, readout.num_marks) for each in layers)
        self.head = head
        self.readout = readout
        self.gate_scale = gate_scale
        self.gate_center = gate_center
        self.ragged = ragged

    @property
    def num_layers(self) -> int:
        """Layers, after each of which a token may halt."""
        return len(self.layers)

    def score(self, x: Tensor) -> Tensor:
        """Say how much of each token a layer has finished.

        Args:
            x: Tokens after the layer, shape (..., D).
        Returns:
            Shape (...), in [0, 1].
        """
        return (self.gate_scale * x[..., 0] - self.gate_center).sigmoid()

    def forward(self, *inputs: Tensor, threshold: float | Tensor | None = None) -> HaltingOutput:
        """Run all layers on all tokens, and mask those that have halted.

        Args:
            inputs: As the embedding takes them, each with the batch axis first.
            threshold: Sum of scores at which a token halts, in [0, 1];
                :data:`DEFAULT_THRESHOLD` if None.
        Returns:
            Logits, and which token ran how far.
        """
        threshold = DEFAULT_THRESHOLD if threshold is None else threshold
        x_BTD, is_valid_BT = self.embed(*as_inputs(inputs, self))
        is_class_T = torch.arange(x_BTD.shape[1], device=x_BTD.device) == 0
        running_BT, total_BT = is_valid_BT, torch.zeros_like(x_BTD[..., 0])
        answer_BA: Tensor | float = 0.0
        weights, runs, totals = [], [], []
        for index, layer in enumerate(self.layers):
            # The class token is a key as long as its sample runs; after that nobody looks.
            x_BTD = layer(x_BTD, running_BT | is_class_T)
            step = advance(total_BT, self.score(x_BTD), threshold)
            is_over_BT = step.halts | step.halts[:, :1]
            if index == self.num_layers - 1:
                is_over_BT = torch.ones_like(is_over_BT)
            weight_BT = torch.where(is_over_BT, 1 - total_BT, step.weight) * running_BT
            if self.readout is None:
                answer_BA = answer_BA + weight_BT[:, :1] * x_BTD[:, 0]
            else:
                answer_BA = answer_BA + (weight_BT[..., None] * self.readout.shares(x_BTD)).sum(1)
            weights.append(weight_BT)
            runs.append(running_BT)
            totals.append(step.total.detach().masked_fill(~running_BT, 0.0))
            total_BT = total_BT + weight_BT
            running_BT = running_BT & ~is_over_BT
        total_BTL = torch.stack(totals, 2)
        return _output(self.head(answer_BA), weights, runs, is_valid_BT, total_BTL)

    def parts(self) -> TokenParts:
        """Embedding, layers and head."""
        return TokenParts(self.embed, tuple(self.layers), self.head, self.ragged, self.readout)  # type: ignore[arg-type]

    def without_halting(self) -> MultiExitNetwork:
        """The same as a network of one exit: every token in every layer; weights shared."""
        parts = self.parts()
        if isinstance(self.embed, MarkedEmbed):
            layers = tuple(each.layer for each in parts.layers if isinstance(each, MarkedLayer))
            parts = parts._replace(embed=self.embed.embed, layers=layers)
        return as_one_exit(parts)

    def read(self, x: Tensor) -> Tensor:
        """Read what tokens add to the answer: themselves, or what a readout takes of them.

        Args:
            x: Tokens after a layer, shape (..., D).
        Returns:
            Shape (..., A).
        """
        return x if self.readout is None else self.readout.shares(x)

    def plain(self) -> nn.Module:
        """The plain network: what every saving is measured against; weights shared."""
        return self.without_halting().plain()

    def lengths(self, inputs: Features) -> Tensor:
        """Tokens of each sample that are no padding, shape (B,), int64.

        Args:
            inputs: As for :meth:`forward`.
        """
        if self.ragged is not None:
            return self.ragged.lengths(inputs)
        is_valid_BT: Tensor = self.embed(*inputs)[1]
        return is_valid_BT.sum(1)

    def trimmed(self, inputs: Features) -> Features:
        """A batch of inputs without padding that all samples have.

        Args:
            inputs: As for :meth:`forward`.
        Returns:
            The same, or shorter ones.
        """
        return inputs if self.ragged is None else self.ragged.trim_inputs(inputs)

    @torch.no_grad()
    def costs(self, *inputs: Tensor) -> HaltingCosts:
        """Count what the parts cost.

        Args:
            inputs: A batch like those the network will see; one sample of it is run.
        Returns:
            MACs per sample, token and pair of tokens.
        Raises:
            ShapeError: If there is no sample.
        """
        require_samples("inputs", inputs)
        with evaluation_mode(self):
            x_1D = self.embed(*(tensor[:1] for tensor in inputs))[0][:, 0]
            lengths_B = self.lengths(inputs)
        linear = [count_macs(_TokenPart(layer), x_1D) for layer in self._layers()]
        pairs = [
            count_macs(_PairPart(layer.num_heads), *layer.project(x_1D)) for layer in self._layers()
        ]
        costs = HaltingCosts(
            fixed_macs=count_macs(self.embed, *inputs) + count_macs(self.head, self.read(x_1D)),
            token_macs=tuple(linear),
            pair_macs=tuple(pairs),
            plain_macs=0,
        )
        plain_macs = costs.macs_of_length(lengths_B).double().mean().round()
        return HaltingCosts(**{**vars(costs), "plain_macs": int(plain_macs)})

    def plain_macs(self, *inputs: Tensor) -> Tensor:
        """Count what each sample would cost the plain network, padding left out.

        Args:
            inputs: As for :meth:`costs`.
        Returns:
            MACs of each sample, shape (B,), int64, on the CPU.
        """
        return self.costs(*inputs).macs_of_length(self.lengths(inputs)).cpu()

    def _layers(self) -> Sequence[TransformerLayer]:
        return self.parts().layers


class Step(NamedTuple):
    """The decisions that follow from a layer's halting scores.

    Attributes:
        weight: Of the token after this layer: its score, or the remainder where it halts.
        total: Sum of the scores so far, this one counted.
        halts: Whether the sum reaches the threshold.
    """

    weight: Tensor
    total: Tensor
    halts: Tensor


def advance(total: Tensor, score: Tensor, threshold: float | Tensor) -> Step:
    """Decide which tokens halt: the one place that does, for all passes and exported layers.

    Example:
        >>> advance(torch.tensor([0.5, 0.5]), torch.tensor([0.2, 0.6]), 0.99).weight
        tensor([0.2000, 0.5000])
    """
    new_total = total + score
    halts = new_total >= threshold
    return Step(torch.where(halts, 1 - total, score), new_total, halts)


def add_halting(
    transformer: nn.Module,
    *,
    gate_scale: float = 10.0,
    gate_center: float = 30.0,
    example: Given | None = None,
) -> HaltingNetwork:
    """Let the tokens of a transformer halt.

    As long as no token halts the network is proven to be the backbone, on the example and on
    random inputs, in evaluation and in training.

    Args:
        transformer: Ours with one exit; timm's or torchvision's VisionTransformer; or, of
            transformers and for classification, ViT, DeiT (with a teacher too), DINOv2, CLIP,
            SigLIP, BEiT, ViTMSN, AST, BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT or
            ALBERT. It may answer by its class token, by two, or by the mean of tokens. Its
            weights are shared, not copied.
        gate_scale: Factor on a token's first coordinate in its score.
        gate_center: What is taken off after that; the defaults are the paper's, for ViTs
            pretrained on ImageNet.
        example: One batch of inputs for the proof, each with the batch axis first; a tuple where
            there are several. If None, one of the shape that the model's configuration names; a
            network of ours, whose parts are taken as they are, needs none.
    Returns:
        The network whose tokens halt; it has no weights of its own.
    Raises:
        BackboneCutError: If it is of no kind that is known, or cannot be proven to be the
            backbone.
        InvalidArgumentError: If a gate's number is none.
        ShapeError: If the example has no sample in it.
    Reference: Yin et al. (2022), A-ViT: Adaptive tokens for efficient vision transformer. What
        differs from its code is in docs/decisions/0000-before-the-records.md.
    """
    for name, number in (("gate_scale", gate_scale), ("gate_center", gate_center)):
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise InvalidArgumentError(f"The {name!r} parameter must be a number. Got {number!r}.")
    parts = take_apart(transformer)
    inputs = (
        example_of(transformer)
        if example is None
        else example_inputs(transformer, example, parts.ragged)[0]
    )
    if inputs is not None:
        require_samples("an example", inputs)
        _prove(transformer, parts, inputs)
    return HaltingNetwork(
        parts.embed,
        parts.layers,
        parts.head,
        gate_scale=gate_scale,
        gate_center=gate_center,
        ragged=parts.ragged,
        readout=parts.readout,
    )


_SAME_BUT_FOR_KERNELS = 1e-4
"""Of the largest logit: attention with a mask runs another kernel than attention without one."""


def _prove(transformer: nn.Module, parts: TokenParts, inputs: Features) -> None:
    """Refuse a transformer that is more than its embedding, layers and head."""
    own = own_parts(transformer)
    backbone = transformer if own is None else own.plain
    why = find_difference(backbone, _NobodyHalts(parts), inputs, tolerance=_SAME_BUT_FOR_KERNELS)
    if why is not None:
        raise BackboneCutError(
            f"The tokens of {type(transformer).__name__} cannot halt: {why}. Pass an 'example' if "
            "it takes other inputs, or build a HaltingNetwork from its embedding, layers and head."
        )


class _NobodyHalts(nn.Module):
    """A network whose tokens have the score 0 after every layer but the last."""

    def __init__(self, parts: TokenParts) -> None:
        super().__init__()
        self.network = HaltingNetwork(
            parts.embed,
            parts.layers,
            parts.head,
            gate_scale=0.0,
            gate_center=math.inf,
            ragged=parts.ragged,
            readout=parts.readout,
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        output: HaltingOutput = self.network(*inputs, threshold=1.0)
        return output.logits


def _output(
    logits_BC: Tensor,
    weights: list[Tensor],
    runs: list[Tensor],
    is_valid_BT: Tensor,
    total_BTL: Tensor,
) -> HaltingOutput:
    """The remainder is a token's weight after the last layer that it ran."""
    weight_BTL, runs_BTL = torch.stack(weights, 2), torch.stack(runs, 2)
    depth_BT = runs_BTL.sum(2)
    last_BT1 = (depth_BT - 1).clamp(min=0)[..., None]
    remainder_BT = weight_BTL.gather(2, last_BT1)[..., 0]
    ponder_BT = depth_BT + remainder_BT
    return HaltingOutput(logits_BC, weight_BTL, runs_BTL, ponder_BT, is_valid_BT, total_BTL)


class _TokenPart(nn.Module):
    """The MACs of a layer for each token."""

    def __init__(self, layer: TransformerLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_1D: Tensor) -> Tensor:
        return self.layer.complete(x_1D, self.layer.project(x_1D)[2])


class _PairPart(nn.Module):
    """The MACs of a layer for each pair of tokens."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, query_1A: Tensor, key_1A: Tensor, value_1A: Tensor) -> Tensor:
        return attend(query_1A[None], key_1A[None], value_1A[None], self.num_heads)
