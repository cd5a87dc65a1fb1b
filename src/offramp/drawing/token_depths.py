"""Pictures of how far the tokens of an image go, as in the paper on A-ViT.

Shapes: ``R`` rows and ``S`` columns of patches, ``P`` patches.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from offramp.errors import InvalidArgumentError

_SIDE = 336
"""Pixels of the shorter side of each picture, at least."""
_GAP, _LEGEND, _TEXT = 12, 16, 14
"""Pixels between the pictures, and heights of the legend's colours and of its words."""
_SHALLOW, _DEEP = (38, 43, 99), (250, 214, 74)
"""Colours of the fewest layers and the most."""
_TINT = 0.72
"""Share of the colour in a patch; the rest is the image."""


def patch_grid(num_patches: int, height: int, width: int) -> tuple[int, int]:
    """Find how square patches lie in an image.

    Example:
        >>> patch_grid(49, 28, 28)
        (7, 7)
    """
    side = math.isqrt(height * width // num_patches) if num_patches else 0
    is_grid = side > 0 and height % side == 0 and width % side == 0
    if not is_grid or (height // side) * (width // side) != num_patches:
        raise InvalidArgumentError(
            f"Expected tokens that are square patches of an image of {height}x{width} pixels, "
            f"behind one class token. Got {num_patches} besides it, which no such patches make."
        )
    return height // side, width // side


def draw_depths(
    picture: Image.Image, depth_RS: npt.NDArray[np.int64], num_layers: int
) -> Image.Image:
    """Draw an image, and beside it the layers that each of its patches runs."""
    times = max(1, math.ceil(_SIDE / min(picture.size)))
    size = picture.width * times, picture.height * times
    plain = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
    colours = Image.fromarray(_colours(num_layers)[depth_RS.clip(0, num_layers)])
    tinted = Image.blend(plain, colours.resize(size, Image.Resampling.NEAREST), _TINT)
    sheet = Image.new(
        "RGB", (2 * size[0] + 3 * _GAP, size[1] + 3 * _GAP + _LEGEND + _TEXT), "white"
    )
    sheet.paste(plain, (_GAP, _GAP))
    sheet.paste(tinted, (size[0] + 2 * _GAP, _GAP))
    _draw_legend(sheet, (size[0] + 2 * _GAP, size[1] + 2 * _GAP), size[0], num_layers)
    return sheet


def _colours(num_layers: int) -> npt.NDArray[np.uint8]:
    """From 0 layers to all, shape (num_layers + 1, 3); 0, which is padding, looks like 1."""
    share = np.linspace(0, 1, num_layers)[:, None]
    share = np.concatenate([share[:1], share])
    return ((1 - share) * _SHALLOW + share * _DEEP).round().astype(np.uint8)


def _draw_legend(sheet: Image.Image, corner: tuple[int, int], width: int, num_layers: int) -> None:
    left, top = corner
    draw = ImageDraw.Draw(sheet)
    edges = np.linspace(left, left + width, num_layers + 1).round().astype(int).tolist()
    colours = _colours(num_layers).tolist()
    for number in range(1, num_layers + 1):
        start, end = edges[number - 1], edges[number]
        draw.rectangle((start, top, end - 1, top + _LEGEND - 1), fill=tuple(colours[number]))
        if number in (1, num_layers):
            place, anchor = (start, "la") if number == 1 else (end, "ra")
            words = "1 layer" if number == 1 else f"{number} layers"
            draw.text((place, top + _LEGEND + 2), words, fill="black", anchor=anchor)
