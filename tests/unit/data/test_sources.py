import io
import json
import re
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from offramp.data import parquet, splits
from offramp.data.sources import SOURCES, load_split, nearest, read_parquet
from offramp.errors import DataError, DataNotFoundError, InvalidArgumentError, MissingExtraError

GREY, COLOUR = (1, 4, 3), (3, 4, 3)


def random_pixels(count: int, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)


def encode(pixels_CHW: torch.Tensor) -> bytes:
    pixels = pixels_CHW.permute(1, 2, 0).squeeze(-1).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_parquet(path, files, labels, *, names=None, label_type=None, row_group_size=2):
    """Write labelled images as Hugging Face does."""
    rows = [{"bytes": file, "path": f"{n}.png"} for n, file in enumerate(files)]
    images = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"image": images, "label": pa.array(labels, label_type or pa.int64())})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        content = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": content})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "train.parquet"


# Parquet


@pytest.mark.parametrize("shape", [GREY, COLOUR])
def test_pixels_labels_and_names_come_back(path, shape):
    pixels = random_pixels(5, shape)
    write_parquet(path, map(encode, pixels), [2, 0, 1, 1, 2], names=["a", "b", "c"])
    split = read_parquet(path, image_shape=shape)
    assert torch.equal(split.store[torch.arange(5)], pixels)
    assert torch.equal(split.store[torch.tensor([3, 0])], pixels[[3, 0]])
    assert split.labels_N.tolist() == [2, 0, 1, 1, 2]
    assert split.labels_N.dtype == torch.int64
    assert split.class_names == ("a", "b", "c")


def test_colour_is_read_as_grey_where_the_data_set_is_grey(path):
    write_parquet(path, [encode(torch.full(COLOUR, 7, dtype=torch.uint8))], [0])
    split = read_parquet(path, image_shape=GREY)
    assert torch.equal(split.store[torch.tensor([0])], torch.full((1, *GREY), 7))


def test_classes_without_names_are_called_by_their_number(path):
    write_parquet(path, map(encode, random_pixels(2, GREY)), [0, 2], label_type=pa.int8())
    assert read_parquet(path, image_shape=GREY).class_names == ("0", "1", "2")


def test_large_split_streams_and_equals_the_decoded_one(path, monkeypatch):
    write_parquet(path, map(encode, random_pixels(5, GREY)), [0] * 5)
    decoded = read_parquet(path, image_shape=GREY)
    monkeypatch.setattr(parquet, "MAX_DECODED_BYTES", 5 * 12 - 1)
    streamed = read_parquet(path, image_shape=GREY)
    assert isinstance(decoded.store, torch.Tensor)
    assert isinstance(streamed.store, splits.EncodedImages)
    rows = torch.tensor([4, 1, 1])
    assert torch.equal(streamed.store[rows], decoded.store[rows])
    assert streamed.fingerprint() == decoded.fingerprint()


def test_fingerprint_changes_with_a_pixel_and_with_a_label(path):
    pixels = random_pixels(3, GREY)
    write_parquet(path, map(encode, pixels), [0, 1, 1])
    first = read_parquet(path, image_shape=GREY).fingerprint()
    write_parquet(path, map(encode, pixels), [0, 0, 1])
    assert read_parquet(path, image_shape=GREY).fingerprint() != first
    pixels[2, 0, 3, 2] ^= 1
    write_parquet(path, map(encode, pixels), [0, 1, 1])
    assert read_parquet(path, image_shape=GREY).fingerprint() != first


def test_image_of_another_size_is_refused_with_its_row(path):
    files = [encode(random_pixels(1, GREY)[0]), encode(random_pixels(1, (1, 5, 3))[0])]
    write_parquet(path, files, [0, 0])
    with pytest.raises(DataError, match=r"Row 1 of .*: it has 3x5 pixels, not 3x4"):
        read_parquet(path, image_shape=GREY)


@pytest.mark.parametrize("damage", [lambda f: b"", lambda f: b"text", lambda f: f[:-30]])
def test_unreadable_image_is_refused_with_its_row(path, damage):
    good = encode(random_pixels(1, GREY)[0])
    write_parquet(path, [good, damage(good)], [0, 0])
    with pytest.raises(DataError, match=r"Row 1 of .* holds no readable image"):
        read_parquet(path, image_shape=GREY)


def test_missing_image_is_refused_with_its_row(path):
    write_parquet(path, [encode(random_pixels(1, GREY)[0]), None], [0, 0])
    with pytest.raises(DataError, match=r"Row 1 of .* holds no readable image"):
        read_parquet(path, image_shape=GREY)


def test_image_that_is_there_many_times_is_in_memory_once(path):
    pixels = random_pixels(2, GREY)
    files = [encode(pixels[0]), encode(pixels[1])]
    write_parquet(path, [files[n % 2] for n in range(9)], [0] * 9)
    split = read_parquet(path, image_shape=GREY)
    assert torch.equal(split.store[torch.arange(9)], pixels[torch.arange(9) % 2])


def test_rows_that_unpack_to_megabytes_are_refused_before_they_are_read(path, monkeypatch):
    write_parquet(path, [bytes(16 * 2**20)] * 3, [0] * 3)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)
    with pytest.raises(DataError, match=r"2 rows of image.bytes take 16\d+ bytes"):
        read_parquet(path, image_shape=GREY)


def test_one_large_value_among_many_rows_is_refused(path):
    files = [encode(random_pixels(1, GREY)[0])] * 19 + [bytes(5 * 2**20)]
    write_parquet(path, files, [0] * 20, row_group_size=20)
    with pytest.raises(DataError, match=r"one of image.bytes takes 5242880 bytes, more than 419"):
        read_parquet(path, image_shape=GREY)


@pytest.mark.parametrize("most", [2**32, 100])
def test_masks_are_classes_whatever_their_palette_says(path, monkeypatch, most):
    classes = np.arange(12, dtype=np.uint8).reshape(4, 3)
    mask = Image.fromarray(classes).convert("P")
    mask.putpalette([(37 * n) % 256 for n in range(768)])
    file = io.BytesIO()
    mask.save(file, "PNG")
    pixels = random_pixels(3, COLOUR)
    images = pa.array([{"bytes": encode(one)} for one in pixels])
    pq.write_table(pa.table({"image": images, "mask": [{"bytes": file.getvalue()}] * 3}), path)
    monkeypatch.setattr(parquet, "MAX_DECODED_BYTES", most)  # 3 images have 108 bytes, masks 36
    names = tuple(map(str, range(11)))
    split = splits.read_mask_parquet(path, image_shape=COLOUR, class_names=names, ignored_label=11)
    assert torch.equal(split.store[torch.arange(3)], pixels)
    assert split.labels_N[2].flatten().tolist() == [*range(11), 255]
    monkeypatch.setattr(parquet, "MAX_DECODED_BYTES", 35)
    with pytest.raises(DataError, match="masks of at most 35 pixels together"):
        splits.read_mask_parquet(path, image_shape=COLOUR, class_names=names, ignored_label=11)


def test_texts_and_labels_come_back(path):
    texts = ["good", "bad", "good"]
    pq.write_table(pa.table({"text": texts, "label": [1, 0, 1]}), path)
    split = splits.read_text_parquet(path, class_names=("negative", "positive"))
    assert split.texts == ("good", "bad", "good")
    assert split.labels_N.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [(b"bytes", "text is binary"), (None, "missing in 1 rows"), ("x" * 2**21, "2097152 bytes")],
)
def test_column_without_texts_is_refused(path, text, words):
    rows = [text, *([b"a"] if isinstance(text, bytes) else ["a"])]
    pq.write_table(pa.table({"text": rows, "label": [1, 0]}), path)
    with pytest.raises(DataError, match=words):
        splits.read_text_parquet(path, class_names=("negative", "positive"))


def test_more_rows_than_memory_can_hold_are_refused(path, monkeypatch):
    write_parquet(path, map(encode, random_pixels(4, GREY)), [0] * 4)
    monkeypatch.setattr(parquet, "_MOST_ROWS", 3)
    with pytest.raises(DataError, match="it has 4 rows, more than 3"):
        read_parquet(path, image_shape=GREY)


def test_label_that_no_list_of_classes_can_hold_is_refused(path):
    write_parquet(path, [encode(random_pixels(1, GREY)[0])], [10**12])
    with pytest.raises(DataError, match=r"names no classes. Got 1000000000000"):
        read_parquet(path, image_shape=GREY)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 2], []])
def test_labels_out_of_range_are_refused(path, labels):
    write_parquet(path, map(encode, random_pixels(len(labels), GREY)), labels, names=list("abc"))
    with pytest.raises(DataError, match=r"labels in \[0, 2\]"):
        read_parquet(path, image_shape=GREY)


@pytest.mark.parametrize("labels", [[-1], []])
def test_labels_below_any_class_are_refused_without_names_too(path, labels):
    write_parquet(path, map(encode, random_pixels(len(labels), GREY)), labels)
    with pytest.raises(DataError, match=r"labels of at least 0 .* Got (-1|no rows)"):
        read_parquet(path, image_shape=GREY)


@pytest.mark.parametrize(
    ("labels", "kind"), [([0, None], pa.int64()), ([0, 0.5], pa.float64()), (["a", "b"], pa.utf8())]
)
def test_labels_that_are_no_whole_numbers_are_refused(path, labels, kind):
    files = map(encode, random_pixels(2, GREY))
    write_parquet(path, files, labels, names=list("ab"), label_type=kind)
    with pytest.raises(DataError, match="label"):
        read_parquet(path, image_shape=GREY)


def cut_file(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip_bytes(path):
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(255 - byte for byte in content[4:400])
    path.write_bytes(bytes(content))


def make_folder(path):
    path.unlink()
    path.mkdir()


def write_columns(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(cut_file, id="cut"),
        pytest.param(flip_bytes, id="flipped"),
        pytest.param(lambda path: path.write_text("hello"), id="text"),
        pytest.param(make_folder, id="folder"),
        pytest.param(write_columns(image=[{"bytes": b""}]), id="no label"),
        pytest.param(write_columns(label=[0]), id="no image"),
        pytest.param(write_columns(label=[0], image=[{"path": "a.png"}]), id="no bytes"),
        pytest.param(write_columns(label=[0], image=[b"png"]), id="image is no struct"),
    ],
)
def test_damaged_or_foreign_file_is_refused(path, damage):
    write_parquet(path, map(encode, random_pixels(4, GREY)), [0] * 4)
    damage(path)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read_parquet(path, image_shape=GREY)


# Where data is found


def test_digits_come_with_scikit_learn():
    train, test = load_split("digits", "train"), load_split("digits", "test")
    assert len(train.labels_N) + len(test.labels_N) == 1797
    assert train.store.shape[1:] == (1, 8, 8)
    assert train.store.max() == 255
    assert train.class_names == tuple("0123456789")
    # Stratified: every class has about a quarter of its samples in test.
    shares = test.labels_N.bincount() / (train.labels_N.bincount() + test.labels_N.bincount())
    assert shares.min() > 0.24
    assert shares.max() < 0.26


def test_digits_splits_share_no_image_and_repeat():
    train, test = load_split("digits", "train"), load_split("digits", "test")

    def images(split):
        return {image.numpy().tobytes() for image in split.store}

    assert images(train).isdisjoint(images(test))
    assert load_split("digits", "train").fingerprint() == train.fingerprint()


def test_split_that_a_data_set_has_not():
    with pytest.raises(InvalidArgumentError, match=r"splits train, test. Got 'val'"):
        load_split("digits", "val")


def test_data_set_that_there_is_not():
    with pytest.raises(InvalidArgumentError, match="digits"):
        load_split("digit", "train")


@pytest.fixture
def emnist_file(tmp_path):
    folder = tmp_path / "emnist47"
    folder.mkdir()
    files = map(encode, random_pixels(3, (1, 28, 28)))
    return write_parquet(folder / "test.parquet", files, [0, 1, 2])


def test_given_folder_comes_before_the_environment(emnist_file, monkeypatch, tmp_path):
    monkeypatch.setenv("OFFRAMP_DATA", str(tmp_path / "nowhere"))
    split = load_split("emnist47", "test", str(emnist_file.parent))
    assert split.labels_N.tolist() == [0, 1, 2]


def test_environment_is_looked_at_where_no_folder_is_given(emnist_file, monkeypatch):
    monkeypatch.setenv("OFFRAMP_DATA", str(emnist_file.parent.parent))
    assert len(load_split("emnist47", "test").labels_N) == 3


@pytest.mark.parametrize("given", ["argument", "environment", "nothing"])
def test_missing_data_names_the_three_ways(monkeypatch, tmp_path, given):
    monkeypatch.delenv("OFFRAMP_DATA", raising=False)
    if given == "environment":
        monkeypatch.setenv("OFFRAMP_DATA", str(tmp_path))
    with pytest.raises(DataNotFoundError) as caught:
        load_split("emnist47", "train", str(tmp_path) if given == "argument" else None)
    message = str(caught.value)
    for way in ("data=DIR", "OFFRAMP_DATA=DIR", "data=emnist-balanced"):
        assert way in message
    looked = {
        "argument": f"{tmp_path / 'train.parquet'} does not exist",
        "environment": f"{tmp_path / 'emnist47' / 'train.parquet'} does not exist",
        "nothing": "OFFRAMP_DATA is not set",
    }
    assert looked[given] in message
    assert "\n" not in message


def test_data_set_without_a_download_offers_none(tmp_path):
    with pytest.raises(DataNotFoundError) as caught:
        load_split("digits", "train", str(tmp_path))
    assert "download" not in str(caught.value)


# torchvision's download


class FakeEMNIST:
    """Stands for torchvision.datasets.EMNIST."""

    classes = ("0", "A")

    def __init__(self, root, *, split, train, download):
        assert (split, download) == ("balanced", True)
        value = 10 if train else 20
        self.data = torch.full((2, 28, 28), value, dtype=torch.uint8)
        self.targets = torch.tensor([1, 0], dtype=torch.int32)


class UnreachableEMNIST:
    def __init__(self, root, **_):
        raise RuntimeError("Error downloading gzip.zip:\nno network")


@pytest.fixture
def torchvision(monkeypatch):
    """Install a torchvision whose EMNIST is the given class."""

    def install(emnist):
        package, datasets = types.ModuleType("torchvision"), types.ModuleType("datasets")
        datasets.EMNIST = emnist
        package.datasets = datasets
        monkeypatch.setitem(sys.modules, "torchvision", package)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)

    return install


@pytest.mark.parametrize(("name", "value"), [("train", 10), ("test", 20)])
def test_official_emnist_comes_through_torchvision(torchvision, name, value):
    torchvision(FakeEMNIST)
    split = load_split("emnist47", name, "emnist-balanced")
    assert split.store.shape == (2, *SOURCES["emnist47"].image_shape)
    assert split.store.unique().tolist() == [value]
    assert split.labels_N.tolist() == [1, 0]
    assert split.labels_N.dtype == torch.int64
    assert split.class_names == ("0", "A")


def test_failed_download_says_what_else_to_do_in_one_line(torchvision):
    torchvision(UnreachableEMNIST)
    with pytest.raises(DataNotFoundError, match=r"gzip.zip.* data=DIR") as caught:
        load_split("emnist47", "train", "emnist-balanced")
    assert "\n" not in str(caught.value)


def test_missing_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(MissingExtraError, match="pip install torchvision"):
        load_split("emnist47", "train", "emnist-balanced")


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'offramp\[train\]'"):
        load_split("digits", "train")


def test_nearest_word_is_found_even_if_far():
    assert nearest("epoch", ["batch_size", "epochs"]) == "epochs"
    assert nearest("###", ["only"]) == "only"


def test_emnist_is_stored_transposed():
    assert SOURCES["emnist47"].transposed
    assert not SOURCES["digits"].transposed
    assert np.prod(SOURCES["emnist47"].image_shape) == 784
