"""Residual networks whose blocks are skipped input by input."""

from __future__ import annotations

from offramp.model.multi_exit import MultiExitNetwork
from offramp.routing.skip import SkipNetwork, add_gates
from offramp.zoo.resnet import resnet


def skipnet(
    *,
    in_channels: int,
    widths: tuple[int, ...],
    blocks: tuple[int, ...],
    num_classes: int,
    gates: str = "recurrent",
    gate_width: int | None = None,
    num_exits: int | None = None,
) -> SkipNetwork | MultiExitNetwork:
    """Build a residual network with a gate in front of every block but the first.

    Args:
        in_channels: Channels of the images.
        widths: Channels of each group of blocks.
        blocks: Blocks of each group; 0 for the first halves the map right after the stem.
        num_classes: Number of classes.
        gates: recurrent or feed_forward.
        gate_width: As for :func:`~offramp.routing.skip.add_gates`.
        num_exits: 1 for the plain network, without gates; None with them.
    Returns:
        A network for images of shape (B, in_channels, H, W).
    Raises:
        InvalidArgumentError: As :func:`~offramp.zoo.resnet.resnet`, or as
            :func:`~offramp.routing.skip.add_gates`.
        BackboneCutError: If there are fewer than two blocks.
    Reference: Wang et al. (2018), SkipNet; widths 16, 32, 64 and 6 blocks each are their ResNet-38
        for CIFAR-10.
    """
    plain = resnet(
        in_channels=in_channels,
        widths=widths,
        blocks=blocks,
        exits_after=(),
        num_classes=num_classes,
        num_exits=num_exits,
    )
    return plain if num_exits == 1 else add_gates(plain, gates=gates, gate_width=gate_width)
