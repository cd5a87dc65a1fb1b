"""Exit heads that predict a class for every pixel.

Shapes: ``B`` batch, ``C`` channels or classes, ``H W`` pixels of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

_WIDEST = 64
"""Channels inside a head that is chosen for a map."""

_MOST_OTHERS = 16
"""Tokens that stand for no patch: a class token, registers."""


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


@dataclass(frozen=True)
class Maps:
    """The maps among the tensors that cross a cut.

    Attributes:
        read: Index and axis of channels of each, from coarse to fine.
        finest: Height and width of the last.
        grid: Rows and columns that the first tensor's tokens are laid out in; None for a map.
    """

    read: tuple[tuple[int, int], ...]
    finest: tuple[int, int]
    grid: tuple[int, int] | None = None


def find_maps(
    features: Sequence[Tensor],
    image_size: Sequence[int],
    size: Sequence[int],
    axis: int | None = None,
) -> Maps | None:
    """Find what a dense head can read: the first tensor, and of each other size the newest map.

    The first is a map, or tokens (B, T, C) of a grid; ``axis`` is its axis of channels, if known.
    """
    first = features[0]
    if not first.is_floating_point() or first.ndim not in (3, 4):
        return None
    if first.ndim == 3:
        axis = axis or 2
        sides = _grid(first.shape[3 - axis], image_size)
    else:
        axis = axis or _channels_of_map(first, size)
        sides = None if axis is None or axis == 2 else _sides(first, axis)
    if axis is None or sides is None:
        return None
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for index, tensor in enumerate(features[1:], start=1):
        other = _channels_of_map(tensor, size)
        if other is not None:
            found[_sides(tensor, other)] = index, other
    found[sides] = 0, axis
    coarse_to_fine = sorted(found)
    return Maps(
        read=tuple(found[each] for each in coarse_to_fine),
        finest=coarse_to_fine[-1],
        grid=sides if first.ndim == 3 else None,
    )


def _sides(map_: Tensor, axis: int) -> tuple[int, int]:
    height, width = map_.shape[2:] if axis == 1 else map_.shape[1:3]
    return height, width


def _channels_of_map(tensor: Tensor, size: Sequence[int]) -> int | None:
    """The axis of channels of a map that is shaped as the logits are; None for no such map."""
    if tensor.ndim == 4 and tensor.is_floating_point():
        for axis in (1, 3):
            height, width = _sides(tensor, axis)
            if abs(height * size[1] - width * size[0]) < max(size):  # less than a cell
                return axis
    return None


def _grid(num_tokens: int, image_size: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of patches in an image, before which a few other tokens may stand."""
    if len(image_size) != 2:
        return None
    height, width = image_size
    for patch in range(1, min(height, width) + 1):
        rows, columns = height // patch, width // patch
        is_whole = rows * patch == height and columns * patch == width
        if is_whole and 0 <= num_tokens - rows * columns <= min(_MOST_OTHERS, num_tokens // 2):
            return rows, columns
    return None


def dense_head_for(
    features: Sequence[Tensor], maps: Maps, num_classes: int, *, size: tuple[int, int]
) -> nn.Module:
    """Choose the dense head that fits what crosses a cut."""
    (height, width), is_alone = maps.finest, len(maps.read) == 1
    scale = Fraction(size[0], height)
    is_whole = scale == Fraction(size[1], width) and 1 in (scale.numerator, scale.denominator)
    times = scale.numerator if is_whole else 1
    fine = 2 if is_alone and times % 2 == 0 else 1
    heads = []
    for index, axis in maps.read:
        channels = features[index].shape[axis]
        parts: list[nn.Module] = []
        if index == 0 and maps.grid is not None:
            parts = [TokensToMap(maps.grid, axis=axis)]
        elif axis == 3:
            parts = [ChannelsFirst()]
        if is_alone and is_whole and scale < 1:
            parts.append(nn.AvgPool2d(scale.denominator))
        if index == 0:
            head = dense_head(channels, num_classes, width=min(channels, _WIDEST), fine=fine)
        else:
            head = nn.Conv2d(channels, num_classes, 1)
        heads.append(nn.Sequential(*parts, head))
    last: list[nn.Module] = []
    if not is_whole:
        last = [nn.Upsample(size, mode="bilinear", align_corners=False)]
    elif times > fine:
        last = [nn.Upsample(scale_factor=times // fine, mode="bilinear", align_corners=False)]
    elif scale < 1 and not is_alone:
        last = [nn.AvgPool2d(scale.denominator)]
    if is_alone:
        return nn.Sequential(*heads[0], *last)
    return MapsHead(heads, [index for index, _ in maps.read], nn.Sequential(*last))


class MapsHead(ReadsEverything):
    """Dense heads on maps of several sizes, whose logits are added up from coarse to fine.

    Reference: Long et al. (2015), Fully Convolutional Networks, section 4.2, for the skips.
    """

    def __init__(self, heads: Sequence[nn.Module], read: Sequence[int], last: nn.Module) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.last = last
        self._read = tuple(read)

    def forward(self, *features: Tensor) -> Tensor:
        """Map what crosses the cut to logits."""
        coarsest, *others = (
            head(features[index]) for head, index in zip(self.heads, self._read, strict=True)
        )
        sum_BChw: Tensor = coarsest
        for finer in others:
            sum_BChw = finer + upsampled(sum_BChw, finer)
        logits: Tensor = self.last(sum_BChw)
        return logits


class TokensToMap(nn.Module):
    """Lays the last tokens out as a map of so many rows and columns."""

    def __init__(self, size: tuple[int, int], *, axis: int) -> None:
        super().__init__()
        self._size, self._axis = size, axis

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, T, C), or (B, C, T) where channels are axis 1, to (B, C, h, w)."""
        tokens_BCT = tokens if self._axis == 1 else tokens.transpose(1, 2)
        height, width = self._size
        return tokens_BCT[:, :, -height * width :].reshape(*tokens_BCT.shape[:2], height, width)


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
