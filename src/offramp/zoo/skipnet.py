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
