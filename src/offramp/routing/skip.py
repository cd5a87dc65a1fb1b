"""SkipNet: a residual network whose blocks are run or skipped, input by input.

Shapes: ``B`` batch, ``C`` classes, ``G`` gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from offramp.errors import BackboneCutError, reason
from offramp.measure.cost import count_macs, evaluation_mode, require_samples
from offramp.measure.outputs import SaysClasses
from offramp.model.inputs import Given, InputSpec, example_inputs
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.model.proof import find_difference
from offramp.model.ragged import Ragged
from offramp.routing.gates import Gates, GateState, make_gates
from offramp.routing.own import own_parts
from offramp.routing.residual import BUILD, adding_nothing, skip_block, take_apart

Choice = Callable[[Tensor], Tensor]
"""From the probabilities that a block runs, shape (B,), to how much of it does, in [0, 1]."""


class GatedOutput(NamedTuple):
    """The result of a pass over all blocks.

    Attributes:
        logits: Raw logits, shape (B, C).
        probability: With which each gate would run its block, shape (B, G).
        action: How much of each block counted, shape (B, G); 0 or 1 but for soft gates.
    """

    logits: Tensor
    probability: Tensor
    action: Tensor


@dataclass(frozen=True, kw_only=True)
class SkipCosts:
    """MACs per sample of a network that skips blocks, part by part.

    Attributes:
        fixed_macs: What always runs: stem, head, and the way around each block.
        gate_macs: Each gate.
        block_macs: What each block takes more than the way around it.
    """

    fixed_macs: int
    gate_macs: tuple[int, ...]
    block_macs: tuple[int, ...]

    @property
    def plain_macs(self) -> int:
        """The plain network: every block, no gate."""
        return self.fixed_macs + sum(self.block_macs)

    def macs(self, blocks_BG: Tensor) -> Tensor:
        """Return the MACs of each sample."""
        block_macs_G = torch.tensor(self.block_macs, device=blocks_BG.device)
        return self.fixed_macs + sum(self.gate_macs) + (blocks_BG * block_macs_G).sum(1)


class SkipNetwork(SaysClasses, nn.Module):
    """A residual network with a gate in front of every block but the first.

    ``forward`` computes every block and weights it by its gate: for training, and to compare
    with. Skipping is the business of a runner.

    Args:
        stem: From the input to the features in front of the first gate; holds the first block.
        blocks: The residual blocks that may be skipped, in order.
        gates: As many gates.
        head: From the last block's features to logits.
    Attributes:
        num_exits: 1: what is skipped lies inside, and every sample leaves at the end.
    """

    num_exits = 1
    num_classes: int | None = None
    input_specs: tuple[InputSpec, ...] = ()
    ragged: Ragged | None = None

    def __init__(
        self, stem: nn.Module, blocks: Sequence[nn.Module], gates: Gates, head: nn.Module
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.gates = gates
        self.head = head

    @property
    def num_gates(self) -> int:
        """Blocks that may be skipped."""
        return len(self.blocks)

    def ask(self, index: int, x: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Ask a gate.

        Args:
            index: Number of the gate, from 0.
            x: The features in front of its block.
            state: What gates before it remember.
        Returns:
            probability: With which the block shall run, shape (B,).
            state: For the next gate.
        """
        score_B, state = self.gates(index, x, state)
        return score_B.sigmoid(), state

    def run_block(self, index: int, x: Tensor) -> Tensor:
        """Run a block.

        Args:
            index: Number of its gate, from 0.
            x: Its input.
        Returns:
            Its output.
        """
        y: Tensor = self.blocks[index](x)
        return y

    def skip_block(self, index: int, x: Tensor) -> Tensor:
        """Go around a block: the input itself, or its projection where the shape changes.

        Args:
            index: Number of its gate, from 0.
            x: Its input.
        Returns:
            What takes the place of its output.
        """
        return skip_block(self.blocks[index], x)

    def forward(self, x: Tensor, choose: Choice | None = None) -> GatedOutput:
        """Run all blocks and their gates, and weight each block by what is chosen.

        Args:
            x: Inputs, shape (B, ...).
            choose: How much of a block counts; :func:`at_threshold` of 0.5 if None.
        Returns:
            Logits, probabilities and actions.
        """
        choose = choose or at_threshold(0.5)
        state: GateState = ()
        probabilities, actions = [], []
        x = self.stem(x)
        for index in range(self.num_gates):
            probability_B, state = self.ask(index, x, state)
            action_B = choose(probability_B)
            x = _gated_sum(action_B, self.run_block(index, x), self.skip_block(index, x))
            probabilities.append(probability_B)
            actions.append(action_B)
        return GatedOutput(self.head(x), torch.stack(probabilities, 1), torch.stack(actions, 1))

    def trimmed(self, inputs: Features) -> Features:
        """A batch of inputs, which have no padding."""
        return inputs

    def without_gates(self) -> MultiExitNetwork:
        """The same as a network of one exit: every block, no gate; weights shared."""
        return MultiExitNetwork([nn.Sequential(self.stem, *self.blocks)], [self.head])

    def plain(self) -> nn.Module:
        """The plain network: what every saving is measured against; weights shared."""
        return self.without_gates().plain()

    def plain_macs(self, *inputs: Tensor) -> Tensor:
        """Count what each sample would cost the plain network.

        Args:
            inputs: The network's input, with the batch axis first.
        Returns:
            MACs of each sample, shape (B,), int64, on the CPU.
        """
        return torch.full((len(inputs[0]),), self.costs(*inputs).plain_macs)

    @torch.no_grad()
    def costs(self, x: Tensor) -> SkipCosts:
        """Count what the parts cost a sample.

        Args:
            x: Any inputs; the first sample is run.
        Returns:
            MACs per sample.
        Raises:
            ShapeError: If there is no sample.
        """
        require_samples("inputs", [x])
        x = x[:1]
        fixed_macs, gate_macs, block_macs = count_macs(self.stem, x), [], []
        state: GateState = ()
        with evaluation_mode(self):
            x = self.stem(x)
            for index, block in enumerate(self.blocks):
                gate = _Gate(self.gates, index, state)
                gate_macs.append(count_macs(gate, x))
                around = count_macs(_WayAround(block), x)
                fixed_macs += around
                block_macs.append(count_macs(block, x) - around)
                _, state = self.ask(index, x, state)
                x = block(x)
        return SkipCosts(
            fixed_macs=fixed_macs + count_macs(self.head, x),
            gate_macs=tuple(gate_macs),
            block_macs=tuple(block_macs),
        )


class _Gate(nn.Module):
    """A gate as a module of its input alone."""

    def __init__(self, gates: Gates, index: int, state: GateState) -> None:
        super().__init__()
        self.gates, self.index, self.state = gates, index, state

    def forward(self, x: Tensor) -> Tensor:
        score_B: Tensor = self.gates(self.index, x, self.state)[0]
        return score_B


class _WayAround(nn.Module):
    """The module that runs in place of a skipped block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return skip_block(self.block, x)


def runs_block(probability_B: Tensor, threshold: float | Tensor) -> Tensor:
    """Decide who runs a block: the one place that does, for runners and for exported gates."""
    return ~(probability_B < threshold)


def at_threshold(threshold: float) -> Choice:
    """Run a block where its probability reaches a threshold; no gradient."""
    return lambda probability_B: runs_block(probability_B, threshold).to(probability_B.dtype)


def straight_through(probability_B: Tensor) -> Tensor:
    """Draw whether a block runs, with the gradient of a soft gate.

    Reference: Bengio et al. (2013), Estimating or propagating gradients through stochastic
        neurons; as SkipNet's supervised pre-training, but drawn where SkipNet asks for one half.
    """
    hard_B = sampled(probability_B)
    return hard_B + (probability_B - probability_B.detach())  # exactly 0 or 1


def sampled(probability_B: Tensor) -> Tensor:
    """Draw whether a block runs, from torch's global generator; no gradient."""
    return torch.bernoulli(probability_B.detach().nan_to_num(1.0))


def add_gates(
    resnet: nn.Module,
    *,
    gates: str = "recurrent",
    gate_width: int | None = None,
    example: Given | None = None,
) -> SkipNetwork:
    """Put a gate in front of every residual block but the first.

    Blocks are found in the graph of the network, whatever they are called: where the input of
    some layers, or a lighter projection of it, is added to their output. Skipping a block leaves
    that shortcut, and what stands between blocks always runs. With every gate open the network is
    proven to be the backbone, on the example and on random images, in evaluation and in training.

    Args:
        resnet: A convolutional network with residual blocks one after the other, such as ours
            with one exit, or ResNet, RegNet, ConvNeXt, MobileNet and EfficientNet of torchvision,
            timm or transformers; its weights are shared, not copied.
        gates: recurrent (one small LSTM, shared) or feed_forward (two convolutions each).
        gate_width: Units of the LSTM, or channels of a gate's convolutions; the paper's if None:
            10, and those of the features, which takes a sixth of what a block does.
        example: A batch of images, shape (B, C, H, W), for the proof; random ones, of the
            smallest size that the network takes, if None, and of a network of ours, whose parts
            are taken as they are, only the ways around its blocks are looked at.
    Returns:
        The network with gates, which are new.
    Raises:
        BackboneCutError: If it is no such network, has fewer than two blocks, or cannot be proven
            to be the backbone.
        InvalidArgumentError: If there is no such kind of gates, or their width is less than 1.
        ShapeError: If the example has no sample in it.
    Reference: Wang et al. (2018), SkipNet: Learning dynamic routing in convolutional networks.
    """
    parts = take_apart(resnet)
    first, *others = parts.blocks
    if not others:
        raise BackboneCutError(
            "Expected a residual network of at least two blocks, since the first is never gated. "
            f"Got {len(parts.blocks)}."
        )
    given = _images_for(resnet) if example is None else example
    images, *_ = example_inputs(resnet, given, None)[0]
    require_samples("an example", [images])
    stem = nn.Sequential(parts.stem, first)
    channels = _channels(stem, others, images)
    network = SkipNetwork(stem, others, make_gates(gates, channels, gate_width), parts.head)
    _prove(resnet, network, images, has_example=example is not None)
    return network


_SIDES = (32, 64, 128, 224)
"""Heights and widths of the images of a proof: the first that a network takes; small is fast."""


def _images_for(backbone: nn.Module) -> Tensor:
    """An image of the smallest size that a backbone takes, of zeros."""
    stem = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d)), None)
    if stem is None:
        raise BackboneCutError(
            f"Expected a convolutional network. Got {type(backbone).__name__}, in which there is "
            f"no convolution. {BUILD}"
        )
    why = ""
    with torch.no_grad(), evaluation_mode(backbone):
        for side in _SIDES:
            images = stem.weight.new_zeros(1, stem.in_channels, side, side)
            try:
                backbone(images.clone())
            except Exception as error:  # such as a window that is larger than the map
                why = reason(error)
            else:
                return images
    raise BackboneCutError(
        f"{type(backbone).__name__} fails on images of {_SIDES[0]} to {_SIDES[-1]} pixels "
        f"({why}): pass an 'example' of the images that it takes."
    )


def _channels(stem: nn.Module, blocks: Sequence[nn.Module], images: Tensor) -> list[int]:
    """Channels that each block reads; a block that writes on what it reads is refused."""
    channels = []
    with torch.no_grad(), evaluation_mode(nn.ModuleList([stem, *blocks])):
        x = stem(images[:1].clone())
        for index, block in enumerate(blocks):
            if x.ndim != 4:
                raise BackboneCutError(
                    f"Expected maps of shape (B, C, H, W) in front of residual block {index + 1}. "
                    f"Got {tuple(x.shape)}: tokens are for add_halting."
                )
            channels.append(x.shape[1])
            before = x.clone()
            y = block(x)
            if not torch.equal(before, x):
                raise BackboneCutError(
                    f"Residual block {index + 1} writes on its input, which skipping it needs: "
                    "set 'inplace=False' in the module that the block begins with."
                )
            x = y
    return channels


def _prove(resnet: nn.Module, network: SkipNetwork, images: Tensor, *, has_example: bool) -> None:
    """Refuse gates on a network that is more than its stem, blocks and head."""
    own, why = own_parts(resnet), None
    if own is None:
        why = find_difference(resnet, _AllOpen(network), (images,))
    else:  # its parts were taken as they are
        if has_example:
            why = find_difference(own.plain, _AllOpen(network), (images,))
        why = why or _find_unlike_its_way_around(network, images)
    if why is not None:
        raise BackboneCutError(
            f"{type(resnet).__name__} cannot be given gates: {why}. Pass an 'example' if it takes "
            "other images, or build a SkipNetwork from its stem, blocks and head."
        )


class _AllOpen(nn.Module):
    """A network with every gate open.

    In training as the runner has it: blocks alone, since a projection that runs in its block and
    for the way around it moves its statistics twice.
    """

    def __init__(self, network: SkipNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            logits: Tensor = self.network.plain()(x)
            return logits
        output: GatedOutput = self.network(x, at_threshold(0.0))
        return output.logits


@torch.no_grad()
def _find_unlike_its_way_around(network: SkipNetwork, images: Tensor) -> str | None:
    """Find a block that is not what goes around it when all that it adds has the weight zero."""
    with evaluation_mode(network):
        x = network.stem(images[:1].clone())
        for index, block in enumerate(network.blocks):
            try:
                with adding_nothing(block):
                    ran, skipped = network.run_block(index, x.clone()), network.skip_block(index, x)
            except Exception as error:  # such as a block without an activation that is known
                return f"block {index + 1} cannot be gone around ({reason(error)})"
            if ran.shape != skipped.shape or not torch.allclose(
                ran, skipped, rtol=1e-4, atol=1e-6, equal_nan=True
            ):
                return f"block {index + 1} does not end in its shortcut and an activation"
            x = network.run_block(index, x)
    return None


def _gated_sum(action_B: Tensor, ran: Tensor, skipped: Tensor) -> Tensor:
    action_B111 = action_B.reshape(-1, *(1,) * (ran.ndim - 1))
    return action_B111 * ran + (1 - action_B111) * skipped
