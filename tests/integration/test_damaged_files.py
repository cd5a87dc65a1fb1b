"""Files that are cut short, foreign, or of a newer schema: one line that names the file."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from offramp.artifacts import SCHEMA_VERSION

SMALL_EMNIST = ("train", "emnist-mlp", "--epochs", 1, "--set", "widths=8,8,8", "--out", "new")
NEWER = ("schema version 99", f"reads up to {SCHEMA_VERSION}", "pip install --upgrade offramp")


def cut_short(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


@pytest.fixture
def resume(train_command):
    return [*train_command, "--out", "run", "--resume"]


@pytest.fixture
def emnist_like(write_parquet):
    """Two splits of a few blank images with every one of EMNIST's 47 labels, and some others."""

    def write(labels):
        images = np.zeros((len(labels), 28, 28), dtype=np.uint8)
        for split in ("train", "test"):
            write_parquet(f"emnist47/{split}.parquet", images, labels)

    return write


def test_a_good_parquet_file_is_taken(workplace, offramp, emnist_like, monkeypatch):
    emnist_like(range(47))
    monkeypatch.setenv("OFFRAMP_DATA", str(workplace))
    assert offramp(*SMALL_EMNIST).code == 0


@pytest.mark.parametrize("wrong", [60, -1])
def test_labels_out_of_range_are_refused(refuses, emnist_like, wrong):
    emnist_like([*range(47), wrong])
    refuses(*SMALL_EMNIST, "--data", "emnist47", words=(str(wrong), "[0, "))


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_corrupt_parquet_file_is_refused(workplace, refuses, emnist_like, share):
    emnist_like(range(47))
    cut_short(workplace / "emnist47" / "train.parquet", share)
    refuses(*SMALL_EMNIST, "--data", "emnist47", words=("emnist47/train.parquet", "damaged"))


def test_a_parquet_file_with_other_columns_is_refused(workplace, refuses):
    pq.write_table(pa.table({"text": ["a"]}), workplace / "train.parquet")
    refuses(*SMALL_EMNIST, "--data", ".", words=("train.parquet", "image", "label"))


def test_images_of_another_size_are_refused(workplace, refuses, write_parquet):
    write_parquet("small/train.parquet", np.zeros((1, 8, 8), dtype=np.uint8), [0])
    refuses(*SMALL_EMNIST, "--data", "small", words=("28x28", "Row 0", "8x8"))


def test_an_image_that_cannot_be_read_is_refused(workplace, refuses):
    images = [{"bytes": b"no picture", "path": None}]
    pq.write_table(pa.table({"image": images, "label": [0]}), workplace / "train.parquet")
    refuses(*SMALL_EMNIST, "--data", ".", words=("Row 0", "train.parquet", "image"))


def test_an_unfinished_run_says_how_to_finish_it(unfinished_run, refuses):
    words = ("not trained to the end", "offramp train digits-mlp", "--out run", "--resume")
    refuses("evaluate", "run", words=words)


def test_a_run_is_not_resumed_with_other_settings(unfinished_run, refuses, resume):
    refuses(*resume, "--seed", 1, words=("other settings", "--out"))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(unfinished_run, refuses, resume, share):
    cut_short(unfinished_run / "last.ckpt", share)
    refuses(*resume, words=("run/last.ckpt", "damaged"))


def test_a_checkpoint_of_a_newer_schema_is_refused(unfinished_run, refuses, resume):
    path = unfinished_run / "last.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "offramp_schema_version": 99}, path)
    refuses(*resume, words=("run/last.ckpt", *NEWER))


def test_a_checkpoint_of_another_network_is_refused(unfinished_run, refuses, resume, offramp):
    offramp("train", "--epochs", 1, "--set", "widths=8,8,8", "--out", "other")
    shutil.copy("other/last.ckpt", unfinished_run)
    refuses(*resume, words=("run/last.ckpt", "another network"))


@pytest.mark.parametrize("name", ["recipe.json", "policy.json"])
def test_json_of_a_newer_schema_is_refused(calibrated_run, refuses, edit_json, name):
    edit_json(calibrated_run / name, schema_version=99)
    refuses("evaluate", "run", words=(f"run/{name}", *NEWER))


@pytest.mark.parametrize("name", ["recipe.json", "policy.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"schema_version": 1}'])
def test_json_that_is_not_ours_is_refused(calibrated_run, refuses, name, content):
    (calibrated_run / name).write_bytes(content)
    refuses("evaluate", "run", words=("run/" + name,))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("recipe.json", {"recipe__data": "mnist48"}),
        ("recipe.json", {"recipe__network": "transformer"}),
        ("recipe.json", {"recipe__network_options": None}),
        ("recipe.json", {"recipe__normalisation__deviation": 0}),
        ("recipe.json", {"recipe__fit__epochs": "many"}),
        ("recipe.json", {"recipe__calibration_share": None}),
        ("policy.json", {"policy__kind": "oracle"}),
        ("policy.json", {"policy__thresholds": [0.5]}),
        ("policy.json", {"policy__thresholds": ["high", "low"]}),
        ("policy.json", {"data": 5}),
    ],
    ids=str,
)
def test_json_with_impossible_values_is_refused(calibrated_run, refuses, edit_json, name, change):
    edit_json(calibrated_run / name, **change)
    refuses("evaluate", "run", words=("run/" + name,))


@pytest.mark.parametrize("share", [0, 0.01, 0.99])
def test_truncated_weights_are_refused(calibrated_run, refuses, share):
    cut_short(calibrated_run / "model.safetensors", share)
    refuses("evaluate", "run", words=("run/model.safetensors",))


def test_weights_of_another_network_are_refused(calibrated_run, refuses, offramp):
    offramp("train", "--epochs", 1, "--set", "widths=8,8,8", "--out", "other")
    shutil.copy("other/model.safetensors", calibrated_run)
    refuses("evaluate", "run", words=("run/model.safetensors", "another network"))
