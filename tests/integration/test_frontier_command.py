"""``offramp frontier``: curves of runs and bundles, their data for plots, and wrong input."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest

from offramp import collect, frontier, load
from offramp.calibration.temperature import describe_temperatures, fit_temperatures
from offramp.data.images import make_loader
from offramp.runs.run import load_batches

RUN_KEYS = {
    "run",
    "recipe",
    "num_samples",
    "num_calibration_samples",
    "plain_macs",
    "area",
    "points",
    "exits",
    "reliability",
}


@pytest.fixture
def curves(offramp):
    """The content of the JSON for runs and options."""

    def content(*arguments):
        outcome = offramp("frontier", *arguments, "--json", "-")
        assert (outcome.code, outcome.stderr) == (0, "")
        return json.loads(outcome.stdout)

    return content


@pytest.fixture(scope="session")
def static_training(tmp_path_factory, offramp):
    """A smaller network of one exit, trained without calibration data."""
    folder = tmp_path_factory.mktemp("trained") / "static"
    settings = ("variant=static", "widths=32,32,32", "calibration_share=0")
    options = [text for setting in settings for text in ("--set", setting)]
    outcome = offramp("train", "digits-mlp", "--epochs", 1, *options, "--out", folder)
    assert outcome.code == 0, outcome.stderr
    return folder


@pytest.fixture
def static_run(workplace, static_training):
    ignore = shutil.ignore_patterns("logs", "last.ckpt")
    return shutil.copytree(static_training, workplace / "static", ignore=ignore)


def logits_of(loaded, split):
    batches, _, _ = load_batches(loaded.recipe, split)
    return collect(loaded.network, make_loader(batches, batch_size=256))


def test_json_is_what_the_function_finds(run, curves):
    content = curves(run, "--points", 4, "--rule", "margin", "--device", "cpu")
    assert {key: content[key] for key in ("split", "data", "rule")} == {
        "split": "test",
        "data": "digits",
        "rule": "margin",
    }
    (curve,) = content["runs"]
    loaded = load(run)
    calibration, test = (logits_of(loaded, split) for split in ("calibration", "test"))
    found = frontier(calibration, test, num_points=4, rule="margin")
    assert curve.keys() == RUN_KEYS
    assert (curve["run"], curve["recipe"]) == (str(run), "digits-mlp")
    assert curve["num_samples"] == 450
    assert curve["num_calibration_samples"] == len(calibration.labels_N)
    assert {key: curve[key] for key in found.to_dict()} == found.to_dict()
    reliability = describe_temperatures(test, fit_temperatures(calibration))
    assert curve["reliability"] == json.loads(json.dumps([r.to_dict() for r in reliability]))


def test_a_run_needs_no_policy_and_gets_none(run, curves):
    before = {path.name for path in run.iterdir()}
    curves(run, "--points", 2)
    assert {path.name for path in run.iterdir()} == before


def test_figures_agree_with_evaluate(run, offramp, curves):
    point = curves(run, "--points", 3)["runs"][0]["points"][1]
    by_hand = ",".join("off" if t is None else str(t) for t in point["thresholds"])
    offramp("calibrate", run, "--thresholds", by_hand)
    figures = json.loads(offramp("evaluate", run, "--json", "-").stdout)
    assert figures["accuracy"] == pytest.approx(point["accuracy"])
    assert figures["mean_macs"] == pytest.approx(point["mean_macs"])


def test_tables_show_points_exits_and_areas(run, static_run, offramp):
    asked = ("frontier", "run", "static", "--points", 3)
    outcome = offramp(*asked, "--json", "curves.json")
    assert (outcome.code, outcome.stderr) == (0, "")
    content = json.loads((run.parent / "curves.json").read_text())
    assert [curve["run"] for curve in content["runs"]] == ["run", "static"]
    for curve in content["runs"]:
        assert f"{curve['run']}, test, 450 samples" in outcome.stdout
        for point in curve["points"]:
            assert f"{point['mean_macs']:,.0f}" in outcome.stdout
        for alone in curve["exits"]:
            line = rf"exit {alone['index']} alone +{100 * alone['accuracy']:.2f} %"
            assert re.search(line, outcome.stdout)
        assert outcome.stdout.count(f"{100 * curve['area']:.2f} %") >= 2
    assert "chosen on" in outcome.stdout
    assert "areas" not in offramp("frontier", "static").stdout


def test_network_of_one_exit_needs_no_calibration_data(static_run, curves):
    (curve,) = curves(static_run)["runs"]
    (point,), (alone,) = curve["points"], curve["exits"]
    assert point["thresholds"] == []
    assert point["calibration_accuracy"] is None
    assert point["mean_macs"] == alone["macs"] == curve["plain_macs"]
    assert point["accuracy"] == alone["accuracy"] == curve["area"]
    assert (curve["num_calibration_samples"], curve["reliability"]) == (0, None)


def test_a_bundle_is_followed_as_its_run_is(exported_run, curves):
    of_run, of_bundle = curves("run", "run/bundle", "--points", 3)["runs"]
    assert of_bundle["run"] == "run/bundle"
    assert of_bundle["plain_macs"] == of_run["plain_macs"]
    assert of_bundle["area"] == pytest.approx(of_run["area"], abs=0.005)
    assert [e["macs"] for e in of_bundle["exits"]] == [e["macs"] for e in of_run["exits"]]


# Run in a folder that holds a run without policy (run) and a text file (file) and nothing else.
REFUSED = {
    "no run told": ("frontier", ("RUN", "frontier --help")),
    "no run": ("frontier run nowhere", ("nowhere", "recipe.json", "offramp train")),
    "train": ("frontier run --split train", ("train", "--split test")),
    "calibration": ("frontier run --split calibration", ("calibration", "--split test")),
    "unknown split": ("frontier run --split tset", ("train, test", "'tset'")),
    "no points": ("frontier run --points 0", ("num_points", "[2, 1000]", "0")),
    "one point": ("frontier run --points 1", ("num_points", "[2, 1000]", "1")),
    "endless points": ("frontier run --points 99999999", ("num_points", "99999999")),
    "points in words": ("frontier run --points few", ("--points", "integer")),
    "unknown rule": ("frontier run --rule sure", ("entropy", "margin", "'sure'")),
    "rule in nats": ("frontier run --rule entropy_nats", ("entropy", "'entropy_nats'")),
    "unknown device": ("frontier run --device tpu", ("cpu", "cuda", "'tpu'")),
    "missing data": ("frontier run --data nowhere", ("nowhere", "--data DIR")),
    "unwritable JSON": ("frontier run --points 2 --json file/figures", ("file/figures", "folder")),
}


@pytest.mark.parametrize(("command", "words"), REFUSED.values(), ids=REFUSED)
def test_wrong_input_is_refused(run, refuses, command, words):
    (run.parent / "file").write_text("no folder")
    refuses(*shlex.split(command), words=words)


def test_several_exits_without_calibration_data_are_refused(run, edit_json, refuses):
    edit_json(run / "recipe.json", recipe__calibration_share=0)
    refuses("frontier", run, words=("calibration_share=0", "--set calibration_share=0.1"))


def test_runs_on_different_data_are_refused(run, static_run, edit_json, refuses):
    edit_json(static_run / "recipe.json", recipe__data="emnist47")
    words = ("one data set", "run on digits", "static on emnist47")
    refuses("frontier", "run", "static", words=words)


def test_runs_on_different_samples_are_refused(
    run, static_run, edit_json, refuses, write_parquet, offramp
):
    write_parquet("data/test.parquet", np.zeros((2, 8, 8), np.uint8), [3, 4])
    edit_json(static_run / "recipe.json", data="data")
    words = ("one test split", "450 samples for run", "2 others for static", "--data DIR")
    refuses("frontier", "run", "static", "--points", 2, words=words)
    assert offramp("frontier", "static", "static", "--data", "data").code == 0
