"""Exit heads that predict a class for every pixel.

Shapes: ``B`` batch, ``C`` channels or classes, ``H W`` pixels of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

from offramp.errors import ShapeError

_WIDEST = 64
"""Channels inside a head that is chosen for a map."""


class ReadsEverything(nn.Module):
    """An exit head that is given all that crosses its cut, the module's output first."""


def dense_head(channels: int, num_classes: int, *, width: int, fine: int = 2) -> nn.Module:
    """A separable convolution, then the logits of several pixels a cell.

    Costs a few percent of the stage that it hangs on: what is wide is a 1x1 convolution, and the
    finer grid is made of channels, not of convolutions on a finer map.

    Reference: Shi et al. (2016), Real-Time Single Image and Video Super-Resolution Using an
        Efficient Sub-Pixel Convolutional Neural Network, section 3.2, for the finer grid.
    """
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, num_classes * fine**2, 1),
        nn.PixelShuffle(fine),
    )


def dense_head_for(
    features: Tensor, num_classes: int, *, axis: int, size: tuple[int, int]
) -> nn.Module:
    """Choose the dense head that fits a stage's map."""
    if features.ndim != 4 or axis not in (1, 3):
        raise ShapeError(
            "Expected a map of shape (B, C, H, W) or (B, H, W, C), since the backbone says a class "
            f"for every pixel. Got features of shape {tuple(features.shape)}."
        )
    height, width = features.shape[2:] if axis == 1 else features.shape[1:3]
    scale = Fraction(size[0], height)
    if scale != Fraction(size[1], width) or 1 not in (scale.numerator, scale.denominator):
        raise ShapeError(
            f"Expected a map whose height and width are a whole part or multiple of the {size[0]} "
            f"x {size[1]} of the backbone's logits. Got {height} x {width}: an example whose sides "
            "are a power of two may do."
        )
    channels, times = features.shape[axis], scale.numerator
    fine = 2 if times % 2 == 0 else 1
    parts: list[nn.Module] = [ChannelsFirst()] if axis == 3 else []
    if scale < 1:
        parts.append(nn.AvgPool2d(scale.denominator))
    parts.append(dense_head(channels, num_classes, width=min(channels, _WIDEST), fine=fine))
    if times > fine:
        parts.append(nn.Upsample(scale_factor=times // fine, mode="bilinear", align_corners=False))
    return nn.Sequential(*parts)


class ChannelsFirst(nn.Module):
    """Maps (B, H, W, C) to (B, C, H, W)."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Move the axis of channels."""
        return x_BHWC.movedim(-1, 1)


class PyramidHead(ReadsEverything):
    """A dense head on maps of several sizes: brought to one width, added up, then a dense head.

    The first map is the one of the module that the exit follows, the deepest. Of the others the
    next deeper is added to each finer one, so that only the finest pays for a 3x3 convolution.

    Reference: Lin et al. (2017), Feature Pyramid Networks, section 3, for the way down.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, *, width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(_lateral(each, width) for each in channels)
        self.context = GlobalContext(width)
        self.head = dense_head(width, num_classes, width=max(width, 64))

    def forward(self, deepest_BCHW: Tensor, *others: Tensor) -> Tensor:
        """Map maps, the deepest first and then from fine to coarse, to logits."""
        deepest, *finer = self.laterals
        top = self.context(deepest(deepest_BCHW))
        for lateral, x_BCHW in zip(reversed(finer), reversed(others), strict=True):
            y_BCHW = lateral(x_BCHW)
            top = y_BCHW + upsampled(top, y_BCHW)
        logits: Tensor = self.head(top)
        return logits


class GlobalContext(nn.Module):
    """Adds to every pixel what the whole map says in the mean.

    Reference: Liu et al. (2016), ParseNet, section 3.1; here added, not joined on.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return x_BCHW + F.relu(self.mix(x_BCHW.mean((2, 3), keepdim=True)))


def upsampled(x_BCHW: Tensor, like_BCHW: Tensor) -> Tensor:
    """Interpolate a map to the size of a finer one."""
    size = like_BCHW.shape[-2:]
    return F.interpolate(x_BCHW, size, mode="bilinear", align_corners=False)


def _lateral(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
