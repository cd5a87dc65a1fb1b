"""One file has one meaning: in training, in evaluation and in predict."""

import io
import struct
import subprocess
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from offramp.data import pictures
from offramp.data.fitted_pictures import read_picture
from offramp.data.pictures import (
    light_on_dark,
    quiet_pillow,
    read_mask_file,
    read_picture_file,
)
from offramp.data.sources import DataSource, read_parquet
from offramp.errors import DataError

SIDE = 8
RAMP = (np.arange(64, dtype=np.uint8) * 4).reshape(SIDE, SIDE)
GREY = Image.fromarray(RAMP)
COLOUR = GREY.convert("RGB")
LONG = RAMP.astype(np.uint16) * 257
RED = Image.new("RGB", (SIDE, SIDE), "red")
ON_PAPER = RAMP.copy()
ON_PAPER[0, 0] = 255  # the black pixel is see-through


def encode(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *, bits, colours, rows=(), extra=()):
    """A PNG that Pillow would not write."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *extra, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def grey_png_of_sixteen_bits(key):
    rows = [row.astype(">u2").tobytes() for row in LONG]
    return png(SIDE, SIDE, bits=16, colours=0, rows=rows, extra=[(b"tRNS", struct.pack(">H", key))])


def colour_png_of_sixteen_bits(*extra):
    rows = [np.repeat(row, 3).astype(">u2").tobytes() for row in LONG]
    return png(SIDE, SIDE, bits=16, colours=2, rows=rows, extra=extra)


def several(kind, **options):
    return encode(COLOUR, kind, save_all=True, append_images=[RED], **options)


AS_THE_RAMP = {
    "grey": encode(GREY),
    "colour": encode(COLOUR),
    "palette": encode(GREY.convert("P")),
    "opaque LA": encode(GREY.convert("LA")),
    "opaque RGBA": encode(GREY.convert("RGBA")),
    "16-bit PNG": encode(Image.fromarray(LONG)),
    "16-bit TIFF": encode(Image.fromarray(LONG), "TIFF"),
    "16-bit TIFF, big-endian": encode(Image.fromarray(LONG.astype(">u2")), "TIFF"),
    "16-bit PGM": b"P5 8 8 65535\n" + LONG.astype(">u2").tobytes(),
    "16-bit colours": colour_png_of_sixteen_bits(),
    "32-bit TIFF": encode(Image.fromarray(LONG.astype(np.int32)), "TIFF"),
    "floats to 1": encode(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
    "floats to 255": encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "PFM": b"Pf\n8 8\n-1.0\n" + (RAMP[::-1].astype("<f4") / 255).tobytes(),
    "CMYK TIFF": encode(COLOUR.convert("CMYK"), "TIFF"),
    "CMYK JPEG": encode(COLOUR.convert("CMYK"), "JPEG", quality=100),
    "JPEG": encode(GREY, "JPEG", quality=100),
    "WebP": encode(COLOUR, "WEBP", lossless=True),
    "BMP": encode(GREY, "BMP"),
    "GIF": encode(GREY, "GIF"),
    "PPM": encode(COLOUR, "PPM"),
    "moving GIF": several("GIF"),
    "moving PNG": several("PNG"),
    "moving WebP": several("WEBP", lossless=True),
    "TIFF of two pages": several("TIFF"),
    "MPO of two photographs": several("MPO", quality=100),
    "large note": encode(GREY, icc_profile=b"x" * 100_000),
}
ON_WHITE = {
    "grey key": encode(GREY, transparency=0),
    "colour key": encode(COLOUR, transparency=(0, 0, 0)),
    "palette key": encode(GREY.convert("P"), transparency=0),
    "palette alphas": encode(GREY.convert("P"), transparency=bytes([0, *[255] * 255])),
    "16-bit key": grey_png_of_sixteen_bits(key=0),
    "GIF key": encode(GREY.convert("P"), "GIF", transparency=0),
    "LA": encode(Image.merge("LA", [GREY, GREY.point(lambda v: 255 if v else 0)])),
    "RGBA": encode(Image.merge("RGBA", [GREY] * 3 + [GREY.point(lambda v: 255 if v else 0)])),
}


def in_every_way(tmp_path, content, shape):
    """What the reader, training and predict make of a file."""
    (tmp_path / "file").write_bytes(content)
    rows = pa.array([{"bytes": content, "path": None}])
    pq.write_table(pa.table({"image": rows, "label": [0]}), tmp_path / "train.parquet")
    with quiet_pillow():
        alone = np.asarray(read_picture_file(content, channels=shape[0]))
    trained = read_parquet(tmp_path / "train.parquet", image_shape=shape).store[torch.tensor([0])]
    predicted = read_picture(tmp_path / "file", DataSource(splits=("train",), image_shape=shape))
    assert torch.equal(trained[0], predicted)
    assert np.array_equal(alone.reshape(*shape[1:], -1).transpose(2, 0, 1), predicted.numpy())
    return predicted.numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", AS_THE_RAMP)
def test_every_way_to_store_a_picture_gives_the_same_pixels(tmp_path, name, channels):
    read = in_every_way(tmp_path, AS_THE_RAMP[name], (channels, SIDE, SIDE))
    assert np.array_equal(read, np.stack([RAMP] * channels))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ON_WHITE)
def test_what_is_see_through_lies_on_white_paper(tmp_path, name, channels):
    read = in_every_way(tmp_path, ON_WHITE[name], (channels, SIDE, SIDE))
    assert np.array_equal(read, np.stack([ON_PAPER] * channels))


@pytest.mark.parametrize("bits", [2, 4])
def test_see_through_key_of_few_bits_is_scaled_as_the_pixels_are(tmp_path, bits):
    row = bytes([0b00100010] * 2) if bits == 2 else bytes([0x12] * 4)  # 0, 2, 0, 2 or 1, 2, 1, 2
    key, other = (0, 170) if bits == 2 else (1, 34)
    extra = [(b"tRNS", struct.pack(">H", key))]
    content = png(SIDE, SIDE, bits=bits, colours=0, rows=[row] * SIDE, extra=extra)
    read = in_every_way(tmp_path, content, (1, SIDE, SIDE))
    assert read[0, 0].tolist() == [255, other] * 4


def test_see_through_colour_of_sixteen_bits(tmp_path):
    content = colour_png_of_sixteen_bits((b"tRNS", struct.pack(">HHH", *[4 * 257] * 3)))
    read = in_every_way(tmp_path, content, (3, SIDE, SIDE))
    assert read[:, 0, :3].tolist() == [[0, 255, 8]] * 3


def test_half_transparent_ink_is_half_as_dark(tmp_path):
    content = encode(Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 128)))
    assert in_every_way(tmp_path, content, (1, SIDE, SIDE)).max() == 127


@pytest.mark.parametrize("ink", [255, 230])
def test_light_ink_on_see_through_ground_lies_on_black_paper(tmp_path, ink):
    drawing = np.zeros((SIDE, SIDE, 4), np.uint8)
    drawing[2:6, 2:6] = (ink, ink, ink, 255)
    read = in_every_way(tmp_path, encode(Image.fromarray(drawing)), (1, SIDE, SIDE))
    assert read[0, 0, 0] == 0
    assert read[0, 3, 3] == ink


def test_faint_shadow_stays_on_white_paper(tmp_path):
    content = encode(Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 20)))
    assert np.unique(in_every_way(tmp_path, content, (1, SIDE, SIDE))).tolist() == [235]


def test_wholly_see_through_picture_is_white(tmp_path):
    content = encode(Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)))
    assert np.unique(in_every_way(tmp_path, content, (1, SIDE, SIDE))).tolist() == [255]


def test_one_bit_is_black_and_white(tmp_path):
    content = encode(Image.fromarray(RAMP > 100))
    read = in_every_way(tmp_path, content, (1, SIDE, SIDE))
    assert np.array_equal(read[0], np.where(RAMP > 100, 255, 0))


@pytest.mark.parametrize("mode", ["YCbCr", "LAB"])
def test_other_colour_spaces_are_near_their_colours(tmp_path, mode):
    read = in_every_way(tmp_path, encode(RED.convert(mode), "TIFF"), (3, SIDE, SIDE))
    assert read[:, 0, 0].tolist() == pytest.approx([255, 0, 0], abs=6)


UPRIGHT = {
    1: RAMP,
    2: RAMP[:, ::-1],
    3: RAMP[::-1, ::-1],
    4: RAMP[::-1],
    5: RAMP.T,
    6: RAMP[::-1].T,
    7: RAMP[::-1, ::-1].T,
    8: RAMP.T[::-1],
    9: RAMP,
}
"""What is to be seen of a stored ramp, by its EXIF orientation; there is no ninth."""


@pytest.mark.parametrize(("kind", "picture"), [("PNG", GREY), ("JPEG", GREY), ("TIFF", GREY)])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_picture_is_turned_as_its_exif_says(tmp_path, kind, picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {}
    read = in_every_way(tmp_path, encode(picture, kind, exif=exif, **options), (1, SIDE, SIDE))
    assert np.array_equal(read[0], UPRIGHT[orientation])


@pytest.mark.parametrize("picture", [Image.fromarray(LONG), GREY.convert("LA"), COLOUR])
def test_long_and_see_through_pictures_are_turned_too(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    read = in_every_way(tmp_path, encode(picture, exif=exif), (1, SIDE, SIDE))
    assert np.array_equal(read[0], UPRIGHT[6])


def test_size_is_that_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(GREY.crop((0, 0, 8, 4)), exif=exif)
    assert in_every_way(tmp_path, content, (1, 8, 4)).shape == (1, 8, 4)
    with pytest.raises(DataError, match="it has 4x8 pixels, not 8x4"):
        read_picture_file(content, channels=1, size=(8, 4))


def test_damaged_exif_says_nothing(tmp_path):
    content = encode(GREY, exif=b"Exif\0\0no such thing")
    assert np.array_equal(in_every_way(tmp_path, content, (1, SIDE, SIDE))[0], RAMP)


# What is refused


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((2, 2), np.nan, np.float32), r"in \[0, 1\] or \[0, 255\], and one is nan"),
        (np.array([[-0.5, 1]], np.float32), "one is -0.5"),
        (np.array([[0, 4000.0]], np.float32), "one is 4000"),
        (np.array([[0, 70_000]], np.int32), r"in \[0, 65535\], and one is 70000"),
        (np.array([[-1, 5]], np.int32), "one is -1"),
    ],
)
def test_numbers_of_no_known_range_are_refused(values, words):
    with pytest.raises(DataError, match=words):
        read_picture_file(encode(Image.fromarray(values), "TIFF"), channels=1)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA"])
def test_other_formats_are_not_even_tried(monkeypatch, kind):
    def fail(*_, **__):
        raise AssertionError("another program was started")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(DataError, match="it is none of PNG, JPEG"):
        read_picture_file(encode(GREY, kind), channels=1)


def header_of(kind, width, height):
    """A small file that says it holds a large picture."""
    if kind == "PNG":
        return png(width, height, bits=8, colours=0)
    if kind == "PPM":
        return b"P5 %d %d 255\n" % (width, height)
    content = bytearray(encode(GREY, kind))
    at, form = {
        "GIF": (6, "<HH"),
        "BMP": (18, "<ii"),
        "JPEG": (content.find(b"\xff\xc0") + 5, ">HH"),
    }[kind]
    sizes = (height, width) if kind == "JPEG" else (width, height)
    content[at : at + struct.calcsize(form)] = struct.pack(form, *sizes)
    return bytes(content)


@pytest.mark.parametrize("kind", ["PNG", "PPM", "GIF", "BMP", "JPEG"])
@pytest.mark.parametrize("size", [(8200, 8200), (10_000, 10_000), (65_000, 65_000)])
def test_large_picture_is_refused_by_its_header(monkeypatch, kind, size):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)  # nothing may be decoded
    with quiet_pillow(), pytest.raises(DataError, match="more than 64 million pixels"):
        read_picture_file(header_of(kind, *size), channels=1)


def test_large_tile_of_a_small_tiff_is_refused():
    tags = {256: 8, 257: 8, 258: 8, 259: 5, 262: 1, 277: 1, 322: 2**15, 323: 2**15, 324: 200}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in tags)
    entries += struct.pack("<HHII", 325, 4, 1, 20)
    content = b"II*\0" + struct.pack("<IH", 8, len(tags) + 1) + entries + bytes(100)
    with pytest.raises(DataError, match="32768x32768 pixels, more than"):
        read_picture_file(content, channels=1)


@pytest.mark.parametrize("content", [b"", b"GIF89a", png(0, 8, bits=8, colours=0), b"P5 0 8 255\n"])
def test_picture_without_pixels_is_refused(content):
    with pytest.raises(DataError):
        read_picture_file(content, channels=1)


def test_note_that_unpacks_to_megabytes_is_refused():
    note = (b"zTXt", b"k\0\0" + zlib.compress(bytes(5_000_000)))
    rows = [row.tobytes() for row in RAMP]
    with pytest.raises(DataError, match="too large"):
        read_picture_file(png(SIDE, SIDE, bits=8, colours=0, rows=rows, extra=[note]), channels=1)


@pytest.mark.parametrize("name", AS_THE_RAMP)
def test_damage_is_a_data_error_or_read_over(name):
    content = AS_THE_RAMP[name]
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(40):
        damaged = bytearray(content[: rng.integers(1, len(content) + 1)])
        for position in rng.integers(0, len(damaged), 3):
            damaged[position] = rng.integers(256)
        with quiet_pillow():
            try:
                read_picture_file(bytes(damaged), channels=3, size=(SIDE, SIDE))
            except DataError as error:
                errors.append(str(error))
    assert errors
    assert not any("\n" in error for error in errors)


# Masks


CLASSES = np.arange(64, dtype=np.uint8).reshape(SIDE, SIDE)
PALETTED = Image.fromarray(CLASSES).convert("P")
PALETTED.putpalette([(37 * n) % 256 for n in range(768)])


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(CLASSES),
        PALETTED,
        Image.fromarray(CLASSES.astype(np.uint16)),
        Image.fromarray(CLASSES).convert("RGB"),
    ],
    ids=["grey", "palette", "16 bit", "grey as colours"],
)
def test_mask_is_read_as_numbers_of_classes(mask):
    assert np.array_equal(read_mask_file(encode(mask), size=(SIDE, SIDE)), CLASSES)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (RED, "a mask has one whole number a pixel, and this has RGB pixels"),
        (GREY.convert("RGBA"), "RGBA pixels"),
        (Image.fromarray(LONG), r"numbers in \[0, 255\], and one is 64764"),
    ],
)
def test_mask_of_no_classes_is_refused(mask, words):
    with pytest.raises(DataError, match=words):
        read_mask_file(encode(mask), size=(SIDE, SIDE))


# Strokes


def test_pictures_with_a_light_ground_are_inverted():
    dark, light = np.zeros((2, 1, 4, 4), np.uint8)
    dark[0, 1, 1], light[:] = 200, 255
    light[0, 1, 1] = 10
    read = light_on_dark(np.stack([dark, light]))
    assert np.array_equal(read[0], dark)
    assert np.array_equal(read[1], 255 - light)


def test_dark_strokes_are_light_in_training_as_in_predict(tmp_path):
    content = encode(Image.merge("RGBA", [GREY.point(lambda _: 0)] * 3 + [GREY]))
    (tmp_path / "file").write_bytes(content)
    rows = pa.array([{"bytes": content, "path": None}])
    pq.write_table(pa.table({"image": rows, "label": [0]}), tmp_path / "train.parquet")
    source = DataSource(splits=("train",), image_shape=(1, SIDE, SIDE), light_on_dark=True)
    split = read_parquet(
        tmp_path / "train.parquet", image_shape=(1, SIDE, SIDE), is_light_on_dark=True
    )
    predicted = read_picture(tmp_path / "file", source)
    assert torch.equal(split.store[torch.tensor([0])][0], predicted)
    assert np.array_equal(predicted[0].numpy(), RAMP)  # ink as dark as it is dense


def test_formats_are_all_known_to_pillow():
    Image.init()
    assert set(pictures.FORMATS) <= set(Image.OPEN)
