"""A segmentation network through the same commands as the classifiers."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from offramp import Session, load
from offramp.measure.outputs import IGNORED_LABEL
from offramp.runs.run import load_batches

SETTINGS = {
    "widths": "4,6",
    "stages": 3,
    "loss_weights": "1,1,1",
    "class_weights": "none",
    "augment": "false",
    "calibration_share": 0.5,
    "batch_size": 2,
    "learning_rate": 0.02,
    "epochs": 6,
}


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Scenes of three grounds that differ in colour, a strip without a class, noise on some."""
    folder, random = tmp_path_factory.mktemp("camvid"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        images, masks = [], []
        for index in range(count):
            mask = np.zeros((180, 240), dtype=np.uint8)
            mask[int(random.integers(60, 120)) :] = 3
            mask[:, int(random.integers(150, 200)) :] = 1
            noise = random.normal(scale=40 * (index % 2), size=(180, 240, 3))
            image = (np.array([40, 100, 0, 200])[mask][..., None] + noise).clip(0, 255)
            mask[:5] = 11
            images.append(_png(image.astype(np.uint8)))
            masks.append(_png(mask))
        pq.write_table(pa.table({"image": images, "mask": masks}), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def seg_run(tmp_path_factory, offramp, scenes):
    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = [text for key, value in SETTINGS.items() for text in ("--set", f"{key}={value}")]
    where = ("--data", scenes, "--out", folder, "--device", "cpu")
    outcome = offramp("train", "camvid-seg", *where, *settings)
    assert outcome.code == 0, outcome.stderr
    assert "% mean IoU" in outcome.stdout
    outcome = offramp("calibrate", folder, "--max-drop", 0.02)
    assert outcome.code == 0, outcome.stderr
    assert "rule pixel_share of pixels surer than" in outcome.stdout
    return folder


def test_training_reports_mean_iou_and_pixel_accuracy(seg_run):
    last = json.loads((seg_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert len(last["exit_mean_iou"]) == len(last["exit_accuracy"]) == 3
    assert last["exit_mean_iou"][-1] > 0.3


def test_unlabelled_pixels_are_read_as_such(seg_run, scenes):
    batches, names, _ = load_batches(load(seg_run).require_recipe(), "val", str(scenes))
    assert len(names) == 11
    assert (batches.labels_N[:, :5] == IGNORED_LABEL).all()
    assert int(batches.labels_N[:, 5:].max()) == 3


def test_evaluate_has_the_mean_iou_of_each_exit(seg_run, offramp):
    outcome = offramp("evaluate", seg_run, "--json", "-")
    figures = json.loads(outcome.stdout)
    assert figures["split"] == "val"
    assert figures["num_samples"] == 6
    assert figures["final_exit_mean_iou"] == figures["exits"][-1]["mean_iou"]
    assert 0 < figures["mean_iou"] <= 1
    assert "mean IoU alone" in offramp("evaluate", seg_run).stdout


@pytest.mark.parametrize("rule", ["mean_entropy", "low_quantile", "agreement"])
def test_other_rules_are_calibrated_and_drawn_alike(seg_run, offramp, rule):
    outcome = offramp("frontier", seg_run, "--rule", rule, "--points", 3, "--json", "-")
    curve = json.loads(outcome.stdout)
    assert curve["rule"] == rule
    assert all("mean_iou" in point for point in curve["runs"][0]["points"])


def test_a_bundle_answers_as_the_run(seg_run, offramp, tmp_path):
    outcome = offramp("export", seg_run, "--out", tmp_path / "bundle")
    assert outcome.code == 0, outcome.stderr
    of_run, of_bundle = (
        json.loads(offramp("evaluate", what, "--data", data, "--json", "-").stdout)
        for what, data in (
            (seg_run, load(seg_run).data),
            (tmp_path / "bundle", load(seg_run).data),
        )
    )
    for figure in ("mean_iou", "mean_macs", "plain_macs", "final_exit_mean_iou"):
        assert of_bundle[figure] == pytest.approx(of_run[figure], abs=1e-4)
    small = np.zeros((1, 3, 64, 96), dtype=np.float32)
    assert Session(tmp_path / "bundle").label_maps(small).output.shape == (1, 64, 96)
    timed = offramp(
        *("time", tmp_path / "bundle", "--data", load(seg_run).data),
        *("--batch-size", 1, "--threads", 1, "--json", "-"),
    )
    assert json.loads(timed.stdout)["results"][0]["stage_bound"] > 0


def test_predict_names_the_largest_classes(seg_run, scenes, offramp, tmp_path):
    image = tmp_path / "scene.png"
    encoded = pq.read_table(scenes / "val.parquet")["image"][0].as_py()["bytes"]
    image.write_bytes(encoded)
    told = offramp("predict", seg_run, image).stdout
    assert "Road" in told or "Building" in told
    outcome = offramp("show", seg_run, "--image", image, "--out", tmp_path / "sheet.png")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.splitlines()[0] == told.rstrip()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] >= 2 * 240


def test_thresholds_by_hand(seg_run, offramp, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(seg_run, run)
    outcome = offramp("calibrate", run, "--thresholds", "0.8,off", "--pixel-threshold", 0.7)
    assert outcome.code == 0, outcome.stderr
    policy = load(run).policy
    assert (policy.thresholds[0], policy.pixel_threshold) == (0.8, 0.7)
    words = "thresholds 0.8000, off (rule pixel_share of pixels surer than 0.7), set by hand"
    assert outcome.stdout == words + "\n"


def test_a_smaller_plain_network_goes_through_the_same_commands(seg_run, scenes, offramp, tmp_path):
    few = {**SETTINGS, "variant": "static", "epochs": 1}
    del few["loss_weights"], few["stages"]
    settings = [text for key, value in few.items() for text in ("--set", f"{key}={value}")]
    rival, image = tmp_path / "rival", tmp_path / "scene.png"
    image.write_bytes(pq.read_table(scenes / "val.parquet")["image"][0].as_py()["bytes"])
    for command in (
        ("train", "camvid-seg", "--data", scenes, "--out", rival, "--device", "cpu", *settings),
        ("predict", rival, image),
        ("show", rival, "--image", image, "--out", tmp_path / "sheet.png"),
        ("export", rival, "--no-plain"),
        ("time", rival, "--batch-size", 1, "--threads", 1),
        ("evaluate", seg_run, "--plain", rival),
    ):
        outcome = offramp(*command)
        assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-drop", 0.01, "--rule", "entropy"), ("must be one of pixel_share",)),
        (("--max-drop", 0.01, "--rule", "pixelshare"), ("pixel_share", "agreement")),
        (("--thresholds", "1,1", "--rule", "pixelshare"), ("pixel_share", "agreement")),
        (("--max-drop", 0.01, "--pixel-threshold", 7), ("in [0, 1]", "Got 7.0")),
        (("--max-drop", 0.01, "--patience", 2), ("--rule agreement",)),
        (("--max-drop", 0.01, "--rule", "learned"), ("one class a sample",)),
        (("--max-drop", 0.01, "--prior", "uniform"), ("--prior weights samples",)),
        (
            ("--max-drop", 0.1, "--guarantee", 0.9),
            ("mean IoU is no mean over images", "--max-risk and --risk 'pixel_error_gap'"),
        ),
        (
            ("--max-risk", 0.01, "--risk", "pixel_error_gap", "--guarantee", 0.95),
            ("6 calibration samples cannot promise", "would do"),
        ),
        (
            ("--thresholds", "1,1", "--rule", "agreement", "--pixel-threshold", 0.5),
            ("--pixel-threshold is for --rule pixel_share",),
        ),
    ],
)
def test_what_makes_no_sense_for_pixels_is_one_clear_line(
    seg_run, offramp, assert_one_line, options, words
):
    outcome = offramp("calibrate", seg_run, *options)
    assert outcome.code == 2
    assert_one_line(outcome.stderr, words)


def test_show_and_pixel_thresholds_are_for_networks_of_pixels(
    run, offramp, assert_one_line, tmp_path
):
    image = tmp_path / "a.png"
    Image.new("L", (8, 8)).save(image)
    outcome = offramp("show", run, "--image", image)
    assert_one_line(outcome.stderr, ("a class for every pixel", "nothing to draw"))
    for wanted in (("--max-drop", 0.01), ("--thresholds", "0.9,0.9")):
        outcome = offramp("calibrate", run, *wanted, "--pixel-threshold", 0.5)
        assert_one_line(outcome.stderr, ("--pixel-threshold is for networks",))
