"""Dense outputs of a bundle: label maps from logits, sizes that are allowed, what they cost.

Shapes: ``B`` batch, ``C`` classes, ``H W`` pixels of images, ``h w`` cells of logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import ShapeError

Array = npt.NDArray[Any]

MAP_STRIDES = (4, 8, 16, 32)
"""Pixels along each axis that a cell of a feature map may stand for."""
_MOST_CLASSES = 255
"""Labels have eight bits, and 255 says that none is known."""


def label_maps(logits_BChw: Array, size: tuple[int, ...]) -> Array:
    """The likeliest class of every pixel: coarse logits are interpolated linearly first."""
    if logits_BChw.ndim != 4 or logits_BChw.shape[1] > _MOST_CLASSES:
        raise ShapeError(
            f"Expected dense logits of shape (B, C, H, W) with at most {_MOST_CLASSES} classes. "
            f"Got {logits_BChw.shape}."
        )
    down_Hh, right_Ww = (
        _interpolation(target, coarse).astype(logits_BChw.dtype)
        for target, coarse in zip(size, logits_BChw.shape[2:], strict=True)
    )
    labels: Array = (down_Hh @ logits_BChw @ right_Ww.T).argmax(1).astype(np.uint8)
    return labels


def _interpolation(target: int, coarse: int) -> Array:
    """The matrix that interpolates between the middles of cells, shape (target, coarse)."""
    place = ((np.arange(target) + 0.5) * coarse / target - 0.5).clip(0, coarse - 1)
    lower = np.minimum(place.astype(np.int64), max(coarse - 2, 0))
    share = place - lower
    matrix = np.zeros((target, coarse))
    rows = np.arange(target)
    matrix[rows, lower] = 1 - share
    matrix[rows, np.minimum(lower + 1, coarse - 1)] += share
    return matrix


def map_cells(height: int, width: int) -> Array:
    """Cells of feature maps of an image: what its MACs grow with."""
    return np.array([1, *(-(-height // s) * -(-width // s) for s in MAP_STRIDES)])
