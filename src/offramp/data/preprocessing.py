"""From picture files, pixels or texts to a network's inputs, without torch.

``predict``, ``show``, ``evaluate``, ``calibrate`` and the recipes all come through here, so that
one picture has one meaning. Shapes: ``B`` batch, ``C`` channels, ``H W`` pixels, ``T`` tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from offramp.errors import DataError, DataNotFoundError, MissingExtraError, reason
from offramp.runtime.preprocessing import AnyPreprocessing, Preprocessing, TextPreprocessing

if TYPE_CHECKING:
    from PIL import Image
    from tokenizers import Tokenizer

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def normalised(pixels_BCHW: Pixels, preprocessing: Preprocessing) -> Floats:
    """Turn pixels into the numbers that the network takes."""
    return scaled(
        pixels_BCHW,
        mean=preprocessing.means,
        deviation=preprocessing.deviations,
        white=preprocessing.white,
    )


def scaled(
    pixels: Pixels, *, mean: Sequence[float], deviation: Sequence[float], white: float = 1.0
) -> Floats:
    """Compute ``(pixel / 255 * white - mean) / deviation``; one number, or one a channel."""
    factors = [white / (255 * one) for one in deviation]
    offsets = [one / other for one, other in zip(mean, deviation, strict=True)]
    inputs: Floats = np.multiply(pixels, _along_channels(factors), dtype=np.float32)
    inputs -= _along_channels(offsets)
    return inputs


def _along_channels(numbers: Sequence[float]) -> Floats:
    array = np.array(numbers, dtype=np.float32)
    return array[0] if len(set(numbers)) == 1 else array[:, None, None]


def read_pixels(file: Path | str | bytes, preprocessing: Preprocessing) -> Pixels:
    """Read a picture file, upright, and bring it into the network's size: (C, H, W), 8 bits."""
    try:
        from offramp.data.pictures import quiet_pillow, read_picture_file
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"Reading pictures needs {error.name}, which is not installed: "
            "pip install 'offramp[predict]'"
        ) from error
    where = "the bytes given" if isinstance(file, bytes) else file
    if not isinstance(file, bytes) and os.path.isdir(file):
        raise DataError(f"Expected an image file. {file} is a folder: name its files, {file}/*.")
    try:
        with quiet_pillow():
            picture = read_picture_file(
                file if isinstance(file, bytes) else Path(file), channels=preprocessing.channels
            )
    except FileNotFoundError as error:
        raise DataNotFoundError(f"There is no image file {file!s}.") from error
    except DataError as error:
        raise DataError(
            f"Expected an image (PNG, JPEG, ...) in {where}, found something unreadable: {error}."
        ) from error
    return _fitted(picture, preprocessing)


def fit_pixels(pixels: npt.ArrayLike, preprocessing: Preprocessing) -> Pixels:
    """Bring the pixels of one picture, (H, W) or (H, W, C) of 8 bits, into the network's size."""
    from PIL import Image

    array = np.asarray(pixels)
    if array.dtype != np.uint8 or array.shape[2:] not in ((), (1,), (3,)) or array.ndim < 2:
        raise DataError(
            "Expected the pixels of one picture, uint8, of shape (height, width) or (height, "
            f"width, 3). Got {array.dtype} of shape {array.shape}."
        )
    picture = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
    return _fitted(picture.convert("L" if preprocessing.channels == 1 else "RGB"), preprocessing)


def _fitted(picture: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """A picture in the network's size, channels first."""
    height, width = preprocessing.height, preprocessing.width
    if preprocessing.light_on_dark:
        picture = _light_on_dark(picture)
    how, resize_to = preprocessing.resize, preprocessing.resize_to
    if resize_to is not None or how == "shorter_side":
        picture = _cut_centre(_resized(picture, preprocessing), (width, height))
    elif picture.size != (width, height):
        if how == "ink_square":
            picture = _ink_square(picture, preprocessing.ink_margin)
        elif how == "middle_square":
            picture = _middle_square(picture)
        picture = picture.resize((width, height), _filter(preprocessing))
    pixels = np.asarray(picture, dtype=np.uint8).reshape(height, width, preprocessing.channels)
    axes = (2, 1, 0) if preprocessing.transposed else (2, 0, 1)
    return pixels.transpose(axes).copy()


def _filter(preprocessing: Preprocessing) -> Any:
    from PIL import Image

    return Image.Resampling[preprocessing.interpolation.upper()]


def _resized(picture: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """In the size of which the centre is cut."""
    side = preprocessing.resize_to or max(preprocessing.height, preprocessing.width)
    size = (side, side)
    if preprocessing.resize == "shorter_side":
        # The longer side is cut off to whole pixels, as torchvision and transformers have it.
        longer = max(side, int(side * max(picture.size) / min(picture.size)))
        size = (side, longer) if picture.width < picture.height else (longer, side)
    return picture if picture.size == size else picture.resize(size, _filter(preprocessing))


def _cut_centre(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centre; black beyond the border."""
    if picture.size == size:
        return picture
    left, top = (round((have - want) / 2) for have, want in zip(picture.size, size, strict=True))
    return picture.crop((left, top, left + size[0], top + size[1]))


def _light_on_dark(picture: Image.Image) -> Image.Image:
    from PIL import Image

    from offramp.data.pictures import light_on_dark

    pixels_CHW = np.moveaxis(np.atleast_3d(np.asarray(picture)), 2, 0)
    bands = [Image.fromarray(band) for band in light_on_dark(pixels_CHW[None])[0]]
    return Image.merge(picture.mode, bands)


def _ink_square(picture: Image.Image, margin: float) -> Image.Image:
    """Cut to the ink's bounding box, centred in a square; the margin is a share of the side."""
    from PIL import Image

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


def make_tokenizer(preprocessing: TextPreprocessing) -> Tokenizer:
    """Make the tokenizer; it cuts long texts and pads none."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"Reading texts needs {error.name}, which is not installed: "
            "pip install 'offramp[predict]'"
        ) from error
    try:
        tokenizer = Tokenizer.from_str(preprocessing.tokenizer)
    except Exception as error:  # the library raises no class of its own
        raise DataError(
            f"Expected a tokenizer that the tokenizers library reads. It does not: {reason(error)}."
        ) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(preprocessing.max_tokens)
    return tokenizer


def pad_ids(ids: Sequence[Sequence[int]], pad_id: int, *, length: int | None = None) -> Ids:
    """Put token ids into one batch, padded to the longest, or to a length: (B, T)."""
    longest = max(map(len, ids), default=0)
    ids_BT = np.full((len(ids), max(longest, length or 1)), pad_id, dtype=np.int64)
    for row, one in zip(ids_BT, ids, strict=True):
        row[: len(one)] = one
    return ids_BT


def text_inputs(
    texts: Sequence[str],
    preprocessing: TextPreprocessing,
    *,
    num_inputs: int = 1,
    length: int | None = None,
) -> tuple[Ids, ...]:
    """Turn texts into token ids, and the mask and token types where a network takes them.

    ``length`` is for networks that take texts of one length.
    """
    coded = make_tokenizer(preprocessing).encode_batch(list(texts))
    empty = next((text for text, c in zip(texts, coded, strict=True) if not c.ids), None)
    if empty is not None:
        raise DataError(f"Expected texts of at least one token. Got {empty!r}: leave it out.")
    columns = [([c.ids for c in coded], preprocessing.pad_id)]
    columns += [([c.attention_mask for c in coded], 0), ([c.type_ids for c in coded], 0)]
    return tuple(pad_ids(ids, pad, length=length) for ids, pad in columns[:num_inputs])


def inputs_of(
    samples: Sequence[str | Path],
    preprocessing: AnyPreprocessing,
    *,
    num_inputs: int = 1,
    length: int | None = None,
) -> tuple[npt.NDArray[Any], ...]:
    """Bring picture files, or texts, into the form that the network takes."""
    if isinstance(preprocessing, TextPreprocessing):
        texts = [str(sample) for sample in samples]
        return text_inputs(texts, preprocessing, num_inputs=num_inputs, length=length)
    return (normalised(np.stack([read_pixels(s, preprocessing) for s in samples]), preprocessing),)
