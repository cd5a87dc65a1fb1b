"""Residual networks for small colour images, with exits between their blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.errors import InvalidArgumentError
from offramp.model.heads import conv_head, pooled_head
from offramp.model.multi_exit import MultiExitNetwork
from offramp.zoo.exits import kept_exits

_LEAST_CHANNELS_LAST = 16
"""Narrower networks stay channels-first: torch 2.13 writes outside its memory in the backward pass
of a 1x1 convolution with a stride there."""


def resnet(
    *,
    in_channels: int,
    widths: tuple[int, ...],
    blocks: tuple[int, ...],
    exits_after: tuple[int, ...],
    num_classes: int,
    num_exits: int | None = None,
) -> MultiExitNetwork:
    """Build a residual network with a 3x3 stem, for images of about 32x32 pixels.

    Groups of basic blocks follow the stem; every group but the first halves height and width.
    Exits before the final one have a convolution of their own.

    Reference: He et al. (2016), Deep Residual Learning for Image Recognition, sections 3.3 and
        4.2; the shortcut across groups is a 1x1 convolution (their option B).
    """
    ends = _exit_ends(widths, blocks, exits_after, num_exits)
    stem = nn.Sequential(
        nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(inplace=True),
    )
    stages, heads = [], []
    parts: list[nn.Module] = [stem]
    channels, number = widths[0], 0
    for group, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for index in range(count):
            stride = 2 if group > 0 and index == 0 else 1
            parts.append(BasicBlock(channels, width, stride=stride))
            channels, number = width, number + 1
            if number in ends:
                stages.append(nn.Sequential(*parts))
                is_final = number == ends[-1]
                heads.append((pooled_head if is_final else conv_head)(channels, num_classes))
                parts = []
    network = MultiExitNetwork(stages, heads)
    if min(widths) >= _LEAST_CHANNELS_LAST:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _exit_ends(
    widths: tuple[int, ...],
    blocks: tuple[int, ...],
    exits_after: tuple[int, ...],
    num_exits: int | None,
) -> tuple[int, ...]:
    """The blocks, counted from 1, that exits follow; the last block is among them."""
    if len(widths) != len(blocks):
        raise InvalidArgumentError(
            f"Expected one width for each of the {len(blocks)} groups of blocks. Got {len(widths)}."
        )
    ends = (*exits_after, sum(blocks))
    if list(ends) != sorted(set(ends)) or ends[0] < 1:
        raise InvalidArgumentError(
            f"The 'exits_after' parameter must hold growing ints in [1, {sum(blocks) - 1}]. "
            f"Got {exits_after}."
        )
    return kept_exits(ends, num_exits)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut around them.

    Reference: He et al. (2016), figure 5, left.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        y: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return y
