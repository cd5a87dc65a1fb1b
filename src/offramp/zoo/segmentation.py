"""A light network for semantic segmentation, with a dense exit after every stage.

Shapes: ``B`` batch, ``C`` channels, ``H W`` pixels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp.errors import InvalidArgumentError
from offramp.model.dense_heads import GlobalContext, dense_head, upsampled
from offramp.model.multi_exit import Features, MultiExitNetwork, as_features


def segmentation(
    *,
    num_classes: int,
    widths: tuple[int, ...] = (32, 64, 128),
    stages: int = 4,
    head_width: int = 64,
    num_exits: int | None = None,
) -> MultiExitNetwork:
    """Build stages that each go down a pyramid of feature maps and up again.

    The first makes the pyramid, at a quarter of the image's size and coarser; the others refine
    all its maps. So every exit has seen the whole scene and fine detail, and its head is a few
    percent of its stage: what is dear in dense prediction stands in the stages, which go on with
    it.

    Reference: Newell et al. (2016), Stacked Hourglass Networks, section 3.3, for predictions
        after each way down and up; here the maps of every size go on to the next.
    """
    if stages < 1 or not widths:
        raise InvalidArgumentError(
            f"Expected at least one stage and one width. Got {stages} stages and widths {widths}."
        )
    num_exits = stages if num_exits is None else num_exits
    if not 1 <= num_exits <= stages:
        raise InvalidArgumentError(
            f"The 'num_exits' parameter must be an int in [1, {stages}], the number of stages. "
            f"Got {num_exits}."
        )
    hourglasses = [Hourglass(widths, is_first=k == 0) for k in range(stages)]
    merged = stages - num_exits + 1
    first = _InTurn(_Stem(widths[0]), *hourglasses[:merged])
    heads = [dense_head(widths[0], num_classes, width=head_width) for _ in range(num_exits)]
    network = MultiExitNetwork([first, *hourglasses[merged:]], [_FinestMap(h) for h in heads])
    network.pixel_multiple = 4
    # Half as long to train on a CPU.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


class Hourglass(nn.Module):
    """One way down a pyramid of maps and up again."""

    def __init__(self, widths: tuple[int, ...], *, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        coarsest = len(widths) - 1
        self.blocks = nn.ModuleList(
            ResidualBlock(width, dilation=2 if i == coarsest else 1)
            for i, width in enumerate(widths)
        )
        self.down = nn.ModuleList(_conv(a, b, stride=2) for a, b in pairwise(widths))
        self.context = GlobalContext(widths[-1])
        self.up = nn.ModuleList(_conv(b, a, kernel=1) for a, b in pairwise(widths))
        self.fuse = nn.ModuleList(_conv(width, width) for width in widths[:-1])

    def forward(self, *maps: Tensor) -> Features:
        """Map the pyramid, from fine to coarse, to another of the same shapes."""
        ways_down: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i == 0:
                x_BCHW = maps[0]
            else:
                from_finer = self.down[i - 1](ways_down[-1])
                x_BCHW = from_finer if self.is_first else maps[i] + from_finer
            ways_down.append(block(x_BCHW))
        ways_up = [self.context(ways_down[-1])]
        for i in reversed(range(len(self.fuse))):
            finer = ways_down[i]
            ways_up.append(self.fuse[i](finer + upsampled(self.up[i](ways_up[-1]), finer)))
        return tuple(reversed(ways_up))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Reference: He et al. (2016), Deep Residual Learning, section 3.3.
    """

    def __init__(self, width: int, *, dilation: int = 1) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, width, H, W) to the same shape."""
        return F.relu(x_BCHW + self.norm(self.second(self.first(x_BCHW))))


class _InTurn(nn.Module):
    """Modules that hand on several maps, one after the other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList(modules)

    def forward(self, *maps: Tensor) -> Features:
        for step in self.steps:
            maps = as_features(step(*maps))
        return maps


class _Stem(nn.Sequential):
    """Brings an image to a quarter of its size."""

    def __init__(self, width: int) -> None:
        super().__init__(_conv(3, width, stride=2), _conv(width, width, stride=2))


class _FinestMap(nn.Module):
    """A head on the finest map of the pyramid."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *maps: Tensor) -> Tensor:
        logits: Tensor = self.head(maps[0])
        return logits


def _conv(in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(
            in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
