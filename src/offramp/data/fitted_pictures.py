"""From an image file of any size to the pixels a recipe's network was trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from offramp.data.known_sources import DataSource
from offramp.data.preprocessing import read_pixels
from offramp.errors import DataError


def read_picture(path: Path | str, source: DataSource) -> Tensor:
    """Read an upright picture and bring it into the form of a data set: (C, H, W), uint8."""
    if source.image_shape is None:
        raise DataError(f"Expected data of images to read {path} for. Got data of texts.")
    return torch.from_numpy(read_pixels(path, source.preprocessing()))
