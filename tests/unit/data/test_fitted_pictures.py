import contextlib
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from offramp.data.fitted_pictures import read_picture
from offramp.data.sources import DataSource
from offramp.errors import DataError, DataNotFoundError

GREY = DataSource(splits=("train",), image_shape=(1, 8, 8))
STROKES = DataSource(
    splits=("train",), image_shape=(1, 28, 28), light_on_dark=True, ink_margin=2 / 28
)
TRANSPOSED = replace(STROKES, transposed=True)
COLOUR = DataSource(splits=("train",), image_shape=(3, 8, 8))


@pytest.fixture
def save(tmp_path):
    """Save a picture and say where."""

    def save(picture: Image.Image, name: str = "picture.png", **options):
        picture.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def upright_one(size: int = 28, *, ink: int = 255, ground: int = 0) -> Image.Image:
    """A vertical bar a quarter as wide as it is high, in the middle."""
    picture = Image.new("L", (size, size), ground)
    s = size / 28
    ImageDraw.Draw(picture).rectangle((11 * s, 2 * s, 17 * s - 1, 26 * s - 1), fill=ink)
    return picture


def ink_box(pixels: torch.Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column with ink."""
    ink = pixels[0] > 127
    rows, columns = ink.any(1).nonzero()[:, 0], ink.any(0).nonzero()[:, 0]
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


BAR = (2, 25, 11, 16)


def test_picture_in_the_form_of_the_data_is_taken_pixel_by_pixel(save):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    read = read_picture(save(Image.fromarray(pixels)), GREY)
    assert read.dtype == torch.uint8
    assert torch.equal(read, torch.from_numpy(pixels)[None])
    read[0, 0, 0] = 5  # it may be written to


def test_path_may_be_a_string(save):
    assert read_picture(str(save(upright_one())), STROKES).shape == (1, 28, 28)


@pytest.mark.parametrize("size", [28, 56, 97, 400])
@pytest.mark.parametrize(("ink", "ground"), [(255, 0), (0, 255), (40, 220)])
def test_strokes_of_any_size_and_polarity_come_out_alike(save, size, ink, ground):
    read = read_picture(save(upright_one(size, ink=ink, ground=ground)), STROKES)
    assert ink_box(read) == pytest.approx(BAR, abs=1)
    assert read[0, :, :8].float().mean() < 40


def test_strokes_are_cut_out_and_centred_wherever_they_are(save):
    page = Image.new("L", (300, 200), 255)
    page.paste(upright_one(56, ink=0, ground=255), (220, 10))
    assert ink_box(read_picture(save(page), STROKES)) == pytest.approx(BAR, abs=1)


def test_transposed_data_gets_rows_for_columns(save):
    top, bottom, left, right = ink_box(read_picture(save(upright_one()), STROKES))
    assert ink_box(read_picture(save(upright_one()), TRANSPOSED)) == (left, right, top, bottom)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_png_of_every_mode_is_read_as_grey(save, mode):
    picture = upright_one().convert(mode)
    assert ink_box(read_picture(save(picture), STROKES)) == BAR


def test_sixteen_bit_grey_keeps_its_contrast(save):
    pixels = np.array(upright_one(ink=200, ground=20), dtype=np.uint16) * 257
    read = read_picture(save(Image.fromarray(pixels)), STROKES)
    assert read.unique().tolist() == [20, 200]


def test_jpeg_is_read(save):
    read = read_picture(save(upright_one(), "picture.jpg", quality=95), STROKES)
    assert ink_box(read) == BAR


def test_transparent_parts_count_as_paper(save):
    ink = upright_one()
    picture = Image.merge("RGBA", [Image.new("L", (28, 28), 0)] * 3 + [ink])
    assert ink_box(read_picture(save(picture), STROKES)) == BAR


def test_photograph_is_turned_upright_as_its_camera_says(save):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    stored = upright_one().transpose(Image.Transpose.ROTATE_90)
    assert ink_box(read_picture(save(stored, "photo.jpg", exif=exif), STROKES)) == BAR


def test_colour_keeps_its_channels_and_the_middle_square(save):
    picture = Image.new("RGB", (40, 16), (255, 0, 0))
    picture.paste((10, 20, 30), (12, 0, 28, 16))
    read = read_picture(save(picture), COLOUR)
    assert read.shape == (3, 8, 8)
    assert read.amin((1, 2)).tolist() == read.amax((1, 2)).tolist() == [10, 20, 30]


def test_grey_picture_fills_the_three_channels_of_colour_data(save):
    read = read_picture(save(Image.new("L", (8, 8), 77)), COLOUR)
    assert read.unique().tolist() == [77]


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("size", [(28, 28), (100, 50), (1, 1)])
def test_blank_picture_is_blank(save, value, size):
    assert read_picture(save(Image.new("L", size, value)), STROKES).unique().tolist() == [0]


# What is refused


def test_missing_file(tmp_path):
    with pytest.raises(DataNotFoundError, match="There is no image file"):
        read_picture(tmp_path / "nowhere.png", GREY)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_file_that_is_no_image(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match="found something unreadable") as caught:
        read_picture(tmp_path / "a.png", GREY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.bmp"])
def test_image_that_ends_early(save, name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    path = save(noise, name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="unreadable"):
        read_picture(path, GREY)


def test_folder_in_place_of_an_image(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read_picture(tmp_path, GREY)


@pytest.mark.parametrize("side", [8200, 10_000, 40_000])
def test_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, side):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(DataError, match=r"million pixels|exceeds limit of \d+ pixels"):
        read_picture(tmp_path / "huge.png", GREY)


def test_damage_anywhere_is_a_data_error_or_read_over(tmp_path, save):
    content = save(upright_one()).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for position in rng.integers(8, len(content), 3):
            damaged[position] = rng.integers(256)
        (tmp_path / "damaged.png").write_bytes(bytes(damaged))
        with contextlib.suppress(DataError):
            read_picture(tmp_path / "damaged.png", STROKES)
