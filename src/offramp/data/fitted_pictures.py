"""From an image file of any size to the pixels a network was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from offramp.data.pictures import Pixels, light_on_dark, quiet_pillow, read_picture_file
from offramp.data.sources import DataSource
from offramp.errors import DataError, DataNotFoundError


def read_picture(path: Path | str, source: DataSource) -> Tensor:
    """Read an upright picture and bring it into the form of a data set.

    Colour becomes grey where the data set is grey; dark strokes on a light ground are inverted
    where its strokes are light. A picture of another size is cut to its ink (data sets of
    strokes) or its middle square (others, but for scenes with masks) and resized. Height and width
    are swapped where the data set stores them so.
    """
    if source.image_shape is None:
        raise DataError(f"Expected data of images to read {path} for. Got data of texts.")
    channels, height, width = source.image_shape
    picture = _read(Path(path), channels)
    if source.light_on_dark:
        picture = _light_on_dark(picture)
    if picture.size != (width, height):
        if source.light_on_dark:
            picture = _ink_square(picture, source.ink_margin)
        elif source.ignored_label is None:
            picture = _middle_square(picture)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels: Pixels = np.asarray(picture, dtype=np.uint8).reshape(height, width, channels)
    axes = (2, 1, 0) if source.transposed else (2, 0, 1)
    return torch.from_numpy(pixels.transpose(axes).copy())


def _read(path: Path, channels: int) -> Image.Image:
    try:
        with quiet_pillow():
            return read_picture_file(path, channels=channels)
    except FileNotFoundError as error:
        raise DataNotFoundError(f"There is no image file {path}.") from error
    except DataError as error:
        raise DataError(
            f"Expected an image (PNG, JPEG, ...) in {path}, found something unreadable: {error}."
        ) from error


def _light_on_dark(picture: Image.Image) -> Image.Image:
    pixels_CHW = np.moveaxis(np.atleast_3d(np.asarray(picture)), 2, 0)
    bands = [Image.fromarray(band) for band in light_on_dark(pixels_CHW[None])[0]]
    return Image.merge(picture.mode, bands)


def _ink_square(picture: Image.Image, margin: float) -> Image.Image:
    """Cut to the ink's bounding box, centred in a square; the margin is a share of the side."""
    grey = np.asarray(picture.convert("L"))
    ink = grey > max(int(grey.max()) // 4, 1)
    if not ink.any():
        return _middle_square(picture)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    cut = picture.crop(box)
    side = max(1, round(max(cut.size) / (1 - 2 * margin)))
    frame = Image.new(cut.mode, (side, side))
    frame.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return frame


def _middle_square(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
