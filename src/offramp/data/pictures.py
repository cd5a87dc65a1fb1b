"""From an image file, or its bytes, to pixels of 8 bits: the only place that opens images.

Training, evaluation, ``predict`` and ``show`` all read here, so one file has one meaning.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from offramp.errors import DataError, reason

Pixels = npt.NDArray[np.uint8]
Read = TypeVar("Read")
Size = tuple[int, int]
"""Width and height, as Pillow orders them."""

MAX_IMAGE_PIXELS = 64 * 2**20
"""Images with more pixels are refused before they are decoded."""
_MOST_PIXELS = f"{MAX_IMAGE_PIXELS // 2**20} million pixels: make it smaller"

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are opened. Others are not tried: Pillow would start Ghostscript for EPS."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Makes a picture upright, by the value of its EXIF orientation."""

_EXIF_KEYS = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"})
_LONG_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N", "F"})
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_TILE_TAGS = (322, 323)
_FEW_BITS = {"L;2": 85, "L;4": 17}
"""Steps between the greys of a PNG of 2 or 4 bits, by Pillow's name of them."""
_FAINT = 64
"""A contrast with white paper below which black paper is tried."""


def read_picture_file(
    file: Path | bytes, *, channels: int, size: Size | None = None
) -> Image.Image:
    """Read a picture, upright, on paper, in 8 bits.

    ==================  ========================================================================
    orientation         turned upright as EXIF or XMP says
    16 bit              the upper 8 bits
    32 bit, whole       taken as 16 bit; refused where a number is beyond
    float               from 0 to 1; from 0 to 255 where a number is above 1; else refused
    transparent parts   white paper; black where all that is drawn is too light to be seen on white
    palette, 1 bit,
    CMYK, LAB, ...      as the colours that they stand for; colour profiles are not applied
    several frames      the first
    ==================  ========================================================================
    """
    mode = "L" if channels == 1 else "RGB"
    picture = _read(file, size, _in_eight_bits)
    return picture if picture.mode == mode else picture.convert(mode)


def read_mask_file(file: Path | bytes, *, size: Size | None = None) -> Pixels:
    """Read a mask: the number of each pixel's class, whatever colour a palette gives it."""
    return _read(file, size, _numbers)


def light_on_dark(pixels_BCHW: Pixels) -> Pixels:
    """Invert the pictures whose ground is light, so that strokes are light on all of them."""
    edges = (
        pixels_BCHW[:, :, (0, -1)].reshape(len(pixels_BCHW), -1),
        pixels_BCHW[:, :, :, (0, -1)].reshape(len(pixels_BCHW), -1),
    )
    is_light_B = np.median(np.concatenate(edges, axis=1), axis=1) > 127
    if not is_light_B.any():
        return pixels_BCHW
    return np.where(is_light_B[:, None, None, None], 255 - pixels_BCHW, pixels_BCHW)


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings; the sizes and the damage that matter are refused here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _read(file: Path | bytes, size: Size | None, use: Callable[[Image.Image], Read]) -> Read:
    """Open, check and decode a picture, turn it upright, and see what ``use`` makes of it."""
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with Image.open(source, formats=FORMATS) as image:
            _check_size(image, size)
            if "transparency" in image.info:
                image.info["transparency"] = _key_in_eight_bits(image)
            image.load()
            upright = _upright(image)
            if size is not None and upright.size != size:
                raise DataError(_other_size(upright, size))
            return use(upright)
    except (DataError, FileNotFoundError):
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"it has more than {_MOST_PIXELS}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"it is none of {', '.join(FORMATS)}, or damaged") from error
    except Exception as error:  # Pillow raises whatever its parsers trip over
        raise DataError(reason(error)) from error


def _check_size(image: Image.Image, size: Size | None) -> None:
    """Refuse by what the header says, before anything is allocated."""
    if size is not None and size not in (image.size, image.size[::-1]):
        raise DataError(_other_size(image, size))
    if 0 in image.size:
        raise DataError(f"it has {image.width}x{image.height} pixels")
    tags = getattr(image, "tag_v2", {})
    tile = [tags.get(tag, 1) for tag in _TILE_TAGS]
    for width, height in (image.size, tile):
        if width * height > MAX_IMAGE_PIXELS:
            raise DataError(f"it has {width}x{height} pixels, more than {_MOST_PIXELS}")


def _other_size(image: Image.Image, size: Size) -> str:
    return f"it has {image.width}x{image.height} pixels, not {size[0]}x{size[1]}"


def _key_in_eight_bits(image: Image.Image) -> Any:
    """The see-through colour as the decoded pixels will have it; a PNG says it in its own bits."""
    key = image.info["transparency"]
    if image.format == "PNG" and image.mode == "RGB" and max(key) > 255:
        return tuple(value >> 8 for value in key)
    if image.format == "PNG" and image.mode == "L":
        return key * _FEW_BITS.get(str(image.tile[0][3]), 1)  # type: ignore[attr-defined]
    return key


def _upright(image: Image.Image) -> Image.Image:
    if not _EXIF_KEYS.isdisjoint(image.info) or hasattr(image, "tag_v2"):
        try:
            turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
        except Exception:  # damaged EXIF says nothing
            turn = None
        if turn is not None:
            return image.transpose(turn)
    return image


def _numbers(image: Image.Image) -> Pixels:
    numbers = np.asarray(image)
    if image.mode == "RGB" and (numbers == numbers[..., :1]).all():
        numbers = numbers[..., 0]
    if numbers.ndim > 2 or numbers.dtype.kind == "f":
        raise DataError(f"a mask has one whole number a pixel, and this has {image.mode} pixels")
    if numbers.dtype != np.uint8 and not 0 <= int(numbers.min()) <= int(numbers.max()) <= 255:
        raise DataError(f"classes are numbers in [0, 255], and one is {_farthest(numbers)}")
    return numbers.astype(np.uint8)


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Grey or colours without transparency."""
    if image.mode in _LONG_MODES:
        image = _upper_bits(image)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = _on_paper(image)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floats as 8 bits; what is see-through stays so."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 255):
            raise DataError(
                f"floats must be in [0, 1] or [0, 255], and one is {_farthest(values)}: save it "
                "with 8 or 16 bits"
            )
        pixels = np.rint(values * (255 if high <= 1 else 1))
    elif not (low >= 0 and high <= 65535):
        raise DataError(
            f"whole numbers of 32 bits must be in [0, 65535], and one is {_farthest(values)}: save "
            "it with 8 or 16 bits"
        )
    else:
        pixels = values >> 8
    grey = Image.fromarray(pixels.astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _farthest(values: npt.NDArray[Any]) -> str:
    low, high = values.min(), values.max()
    return str(low if low < 0 else high)


def _on_paper(image: Image.Image) -> Image.Image:
    # Colours that alpha is in already have no way of their own to RGBA.
    image = image.convert({"La": "LA"}.get(image.mode, "RGBA")).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    contrast = 255 - _extremes(picture)[0]
    if contrast < _FAINT:
        dark = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
        if _extremes(dark)[1] > contrast:
            return dark
    return picture


def _extremes(picture: Image.Image) -> tuple[int, int]:
    low, high = picture.convert("L").getextrema()
    return int(low), int(high)  # type: ignore[arg-type]
