"""Data as users have it: which split, which columns, which class is which number."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from word_level import word_level

import offramp.data.parquet as parquet_module
from offramp.data.folders import draw_evenly, find_split
from offramp.data.own import load_own
from offramp.errors import DataError, DataNotFoundError, InvalidArgumentError
from offramp.runtime.preprocessing import Preprocessing, TextPreprocessing

GREY = Preprocessing(height=4, width=4, channels=1)
VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "film": 4}
WORDS = TextPreprocessing(
    tokenizer=word_level(VOCABULARY),
    max_tokens=8,
    pad_id=0,
)


def picture(value, *, side=6):
    return Image.fromarray(np.full((side, side), value, dtype=np.uint8))


def png(value):
    file = io.BytesIO()
    picture(value).save(file, format="PNG")
    return file.getvalue()


def write_folders(folder, **values):
    """Pictures of one grey each: ``write_folders(path, cat=(1, 2))``."""
    for name, greys in values.items():
        (folder / name).mkdir(parents=True)
        for grey in greys:
            picture(grey).save(folder / name / f"{grey:03}.png")


def write_parquet(path, columns, *, names=None, column="label"):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names is not None:
        features = {"info": {"features": {column: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path)


def structs(*values):
    return pa.array([{"bytes": png(value), "path": None} for value in values])


def seen(split):
    """The grey of each picture, or the ids of each text, with its class."""
    inputs, labels = split.batches.__getitems__(range(len(split.batches)))
    if inputs.ndim == 4:
        greys = np.rint(inputs[:, 0, 0, 0] * 255).astype(int)
        return list(zip(greys.tolist(), labels.tolist(), strict=True))
    return list(zip(inputs.tolist(), labels.tolist(), strict=True))


# Folders of pictures


def test_folders_of_classes_by_split(tmp_path):
    write_folders(tmp_path / "train", cat=(1, 2), dog=(3,))
    write_folders(tmp_path / "test", dog=(4,), cat=(5,))
    names = ("dog", "cat")
    split = load_own(tmp_path, "train", GREY, class_names=names)
    assert (split.name, split.num_samples) == ("train", 3)
    assert seen(split) == [(1, 1), (2, 1), (3, 0)]
    assert seen(load_own(tmp_path, None, GREY, class_names=names, preferred=("test",))) == [
        (5, 1),
        (4, 0),
    ]


def test_folders_of_classes_alone_are_one_split(tmp_path):
    write_folders(tmp_path / "mine", cat=(1,), dog=(3,))
    split = load_own(tmp_path / "mine", None, GREY, num_classes=2)
    assert (split.name, seen(split)) == ("mine", [(1, 0), (3, 1)])


def test_a_picture_of_any_shape_and_colour_is_prepared(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (30, 20), (9, 9, 9)).save(tmp_path / "a" / "one.jpg", quality=95)
    ((grey, label),) = seen(load_own(tmp_path, None, GREY, num_classes=1))
    assert (grey, label) == (pytest.approx(9, abs=1), 0)


@pytest.mark.parametrize(
    ("split", "options", "words"),
    [
        ("val", {}, "no split val. It has test, train"),
        (None, {}, "has the splits test, train"),
        ("train", {"class_names": ("cat", "cow")}, "Found dog"),
        ("train", {"num_classes": 3}, "Expected 3 classes"),
        ("train", {"class_names": ("cat", "dog"), "subset": 4}, "at most the 3"),
        ("train", {"class_names": ("cat", "dog"), "subset": 0}, "at least 1"),
    ],
)
def test_what_is_not_there_or_not_clear_is_refused(split, options, words, tmp_path):
    write_folders(tmp_path / "train", cat=(1, 2), dog=(3,))
    write_folders(tmp_path / "test", cat=(1,), dog=(3,))
    with pytest.raises((DataError, InvalidArgumentError), match=words):
        load_own(tmp_path, split, GREY, **options)


def test_classes_beside_splits_are_refused(tmp_path):
    write_folders(tmp_path, cat=(1,))
    write_folders(tmp_path / "test", dog=(3,))
    with pytest.raises(DataError, match="Found pictures in cat, and folders of pictures in test"):
        find_split(tmp_path, None)


def test_tables_beside_pictures_are_refused(tmp_path):
    write_folders(tmp_path, cat=(1,))
    (tmp_path / "train.csv").write_text("text,label\na,0\n")
    with pytest.raises(DataError, match="Found both"):
        find_split(tmp_path, None)


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(DataNotFoundError, match="no such file"):
        find_split(tmp_path / "none", None)
    with pytest.raises(DataNotFoundError, match="Found none"):
        find_split(tmp_path, None)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"\.parquet, \.csv"):
        find_split(tmp_path / "notes.txt", None)


def test_folders_named_by_numbers_are_the_classes(tmp_path):
    write_folders(tmp_path / "few", **{"0": (1,), "1": (2,)})
    assert seen(load_own(tmp_path / "few", None, GREY, num_classes=2)) == [(1, 0), (2, 1)]
    write_folders(tmp_path / "many", **{str(n): (n + 1,) for n in range(11)})
    with pytest.raises(DataError, match="one order by number and another by name"):
        load_own(tmp_path / "many", None, GREY, num_classes=11)
    names = tuple(str(n) for n in range(11))
    split = load_own(tmp_path / "many", None, GREY, class_names=names)
    assert all(grey == label + 1 for grey, label in seen(split))


def test_damaged_picture_is_named(tmp_path):
    write_folders(tmp_path, cat=(1,))
    (tmp_path / "cat" / "002.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"002\.png"):
        load_own(tmp_path, None, GREY, num_classes=1)


# Parquet


def test_hugging_face_columns_and_shards(tmp_path):
    names = ["dog", "cat"]
    for number, (greys, labels) in enumerate([((1, 2), (0, 1)), ((3,), (1,))]):
        write_parquet(
            tmp_path / "data" / f"train-{number:05}-of-00002.parquet",
            {"img": structs(*greys), "fine_label": pa.array(labels), "coarse_label": labels},
            names=names,
            column="fine_label",
        )
    split = load_own(tmp_path, "train", GREY, class_names=("cat", "dog"))
    assert seen(split) == [(1, 1), (2, 0), (3, 0)]
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="Expected 2 shards of the split train"):
        find_split(tmp_path, "train")


def test_large_columns_and_names_as_labels(tmp_path):
    columns = {
        "image": pa.array([png(7), png(8)], pa.large_binary()),
        "label": pa.array(["cat", "dog"], pa.large_string()),
    }
    write_parquet(tmp_path / "test.parquet", columns)
    split = load_own(tmp_path / "test.parquet", None, GREY, class_names=("dog", "cat"))
    assert (split.name, seen(split)) == ("test", [(7, 1), (8, 0)])


def test_numbers_without_names_are_the_network_s(tmp_path):
    write_parquet(tmp_path / "test.parquet", {"image": structs(7, 8), "label": [1, 0]})
    assert seen(load_own(tmp_path, None, GREY, class_names=("a", "b"))) == [(7, 1), (8, 0)]
    with pytest.raises(DataError, match=r"in \[0, 0\]"):
        load_own(tmp_path, None, GREY, num_classes=1)


def test_samples_without_a_label_are_refused(tmp_path):
    write_parquet(tmp_path / "test.parquet", {"text": ["good", "bad"], "label": [-1, -1]})
    with pytest.raises(DataError, match="Take another split"):
        load_own(tmp_path, None, WORDS, class_names=("a", "b"))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": [0]}, "one column of texts"),
        ({"text": ["a"], "sentence": ["b"], "label": [0]}, "Found text and sentence"),
        ({"text": ["a"], "sort": [0]}, "Found none among text, sort"),
        ({"text": [3], "label": [0]}, "text is int64"),
        ({"text": [None, "a"], "label": [0, 1]}, "missing in 1 rows"),
    ],
)
def test_other_columns_are_refused(columns, words, tmp_path):
    write_parquet(tmp_path / "test.parquet", columns)
    with pytest.raises(DataError, match=words):
        load_own(tmp_path, None, WORDS, num_classes=2)


def test_pictures_for_texts_are_refused_and_the_other_way(tmp_path):
    write_folders(tmp_path / "pictures", cat=(1,))
    with pytest.raises(DataError, match="Expected texts"):
        load_own(tmp_path / "pictures", None, WORDS)
    (tmp_path / "test.csv").write_text("text,label\ngood,0\n")
    with pytest.raises(DataError, match="Expected pictures"):
        load_own(tmp_path / "test.csv", None, GREY)


def test_large_data_streams(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_module, "MAX_DECODED_BYTES", 3)
    write_folders(tmp_path, cat=(1, 2))
    split = load_own(tmp_path, None, GREY, num_classes=1)
    assert type(split.batches.store).__name__ == "PictureStore"
    assert seen(split) == [(1, 0), (2, 0)]


# Texts


CSV = 'sentence,label\n"good, good film",positive\nbad film,negative\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dev.csv", CSV),
        ("dev.csv", "\ufeff" + CSV),
        ("dev.tsv", "sentence\tlabel\ngood, good film\tpositive\nbad film\tnegative\n"),
        (
            "dev.jsonl",
            '{"text": "good, good film", "label": 1}\n\n{"text": "bad film", "label": 0}\n',
        ),
    ],
)
def test_texts_of_csv_and_json_lines(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    split = load_own(tmp_path, None, WORDS, class_names=("negative", "positive"))
    assert (split.name, seen(split)) == ("dev", [([2, 1, 2, 4], 1), ([3, 4, 0, 0], 0)])


def test_texts_of_parquet_are_the_same(tmp_path):
    columns = {"sentence": pa.array(["good film", "bad"], pa.large_string()), "label": [1, 0]}
    write_parquet(tmp_path / "dev.parquet", columns)
    assert seen(load_own(tmp_path, None, WORDS, num_classes=2)) == [([2, 4], 1), ([3, 0], 0)]


def test_mask_and_types_for_networks_that_take_them(tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\ngood film,1\nbad,0\n")
    split = load_own(tmp_path, None, WORDS, num_classes=2, num_inputs=3, length=3)
    (ids, mask, types), _ = split.batches.__getitems__([0, 1])
    assert ids.tolist() == [[2, 4, 0], [3, 0, 0]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0]]
    assert not types.any()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("dev.csv", "", "Got none"),
        ("dev.csv", "text,label\ngood,\n", 'Got ""'),
        ("dev.csv", "text,label\ngood\n", "Got null"),
        ("dev.csv", "text,kind\ngood,1\n", "one column of labels"),
        ("dev.jsonl", "[1]\n", "line 1 is no object"),
        ("dev.jsonl", "{\n", "damaged"),
        ("dev.jsonl", '{"text": "good", "label": 1.5}\n', "Got 1.5"),
        ("dev.csv", "text,label\ngood,film\n", "Expected 2 classes"),
    ],
)
def test_damaged_texts_are_refused(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        load_own(tmp_path, None, WORDS, num_classes=2)


def test_text_that_is_no_utf_8_is_refused(tmp_path):
    (tmp_path / "dev.csv").write_bytes(b"text,label\n\xff\xfe,0\n")
    with pytest.raises(DataError, match="UTF-8"):
        load_own(tmp_path, None, WORDS, num_classes=2)


# Subsets and fingerprints


def test_subset_is_even_by_class_and_repeats():
    labels_N = np.array([0] * 90 + [1] * 8 + [2] * 2)
    rows = draw_evenly(labels_N, 12)
    assert np.bincount(labels_N[rows]).tolist() == [5, 5, 2]
    assert rows == sorted(rows) == draw_evenly(labels_N, 12)
    assert rows != draw_evenly(labels_N, 12, seed=1)
    assert draw_evenly(labels_N, 100) == list(range(100))


def test_fingerprint_is_of_the_whole_split_and_of_what_is_in_it(tmp_path):
    write_folders(tmp_path / "a", cat=(1, 2), dog=(3,))
    write_folders(tmp_path / "b", cat=(1, 2), dog=(4,))
    whole, other = (load_own(tmp_path / name, None, GREY, num_classes=2) for name in "ab")
    part = load_own(tmp_path / "a", None, GREY, num_classes=2, subset=2)
    assert len(part.batches) == 2
    assert part.fingerprint == whole.fingerprint != other.fingerprint
