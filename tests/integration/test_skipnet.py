"""A network that skips blocks through the same commands as the networks with exits."""

import io
import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from offramp import GatePolicy, add_gates, calibrate, collect, load
from offramp.data.images import make_loader
from offramp.model.checkpoint import save_weights
from offramp.runs.hub import save_pretrained
from offramp.runs.run import load_batches, write_policy

SETTINGS = {
    "num_classes": 10,
    "widths": "8,8",
    "blocks": "0,4",  # three of them gated
    "gates": "recurrent",  # that can be drawn, without norms to fit
    "gate_width": 10,
    "augment": "false",
    "calibration_share": 0.3,
    "uniform_prior": "false",
    "class_balance": "none",
    "batch_size": 16,
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "alpha": 0.2,
}


@pytest.fixture(scope="session")
def skip_data(tmp_path_factory):
    """Digits, three times as large, in the place of EMNIST's letters."""
    folder, digits = tmp_path_factory.mktemp("emnist47"), load_digits()
    for split, rows in (("train", slice(0, 400)), ("test", slice(400, 600))):
        encoded = []
        for pixels in digits.images[rows] * (255 / 16):
            enlarged = np.pad(np.kron(pixels.round().astype(np.uint8), np.ones((3, 3))), 2)
            file = io.BytesIO()
            Image.fromarray(enlarged.astype(np.uint8)).save(file, format="PNG")
            encoded.append({"bytes": file.getvalue(), "path": None})
        columns = {"image": encoded, "label": pa.array(digits.target[rows], pa.int64())}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def train_skipnet(tmp_path_factory, offramp, skip_data):
    """Train with further options, into a new folder: the folder, and what was printed."""

    def train(*options):
        folder = tmp_path_factory.mktemp("trained") / "run"
        settings = [text for key, value in SETTINGS.items() for text in ("--set", f"{key}={value}")]
        where = ("--data", skip_data, "--out", folder, "--device", "cpu")
        outcome = offramp("train", "emnist-skipnet", *settings, *where, *options)
        assert (outcome.code, outcome.stderr) == (0, "")
        return folder, outcome.stdout

    return train


@pytest.fixture(scope="session")
def plain_training(train_skipnet):
    """The same network without gates, trained long enough to tell digits apart."""
    return train_skipnet("--set", "variant=plain", "--epochs", 16)[0]


@pytest.fixture(scope="session")
def skip_training(train_skipnet):
    """Three epochs, the last of them by reward."""
    return train_skipnet("--epochs", 3)


@pytest.fixture
def skip_run(workplace, skip_training, plain_training):
    """A run whose blocks matter, which three epochs do not teach, with gates that were drawn."""
    ignore = shutil.ignore_patterns("logs", "last.ckpt")
    folder = shutil.copytree(skip_training[0], workplace / "skipping", ignore=ignore)
    torch.manual_seed(0)
    network = add_gates(load(plain_training).network)
    for parameter in network.gates.parameters():
        torch.nn.init.normal_(parameter)
    save_weights(network, folder / "model.safetensors")
    return folder


@pytest.fixture
def figures(offramp):
    """What a command writes as JSON."""

    def content(*arguments):
        outcome = offramp(*arguments, "--json", "-")
        assert (outcome.code, outcome.stderr) == (0, "")
        return json.loads(outcome.stdout)

    return content


def sweep_of(loaded, split):
    batches, _, _ = load_batches(loaded.recipe, split, loaded.data)
    return collect(loaded.network, make_loader(batches, batch_size=256), thresholds="auto")


def median_probability(run):
    """What about half of a run's gates reach, whatever they have learnt."""
    loaded = load(run)
    images, _ = load_batches(loaded.recipe, "test", loaded.data)[0].__getitems__(list(range(200)))
    with torch.no_grad():
        return float(loaded.network(images).probability.median())


def test_training_reports_the_blocks_that_run(skip_training):
    folder, told = skip_training
    assert len(re.findall(r"blocks run \d+\.\d %", told)) == 3
    recipe = json.loads((folder / "recipe.json").read_text())["recipe"]
    assert recipe["fit"]["gates"]["reward_epochs"] == 1  # as large a share as the recipe's
    assert recipe["fit"]["gates"]["alpha"] == 0.2


@pytest.mark.parametrize(
    ("options", "target"),
    [
        (("--max-drop", 0.05), {"max_drop": 0.05}),
        (("--budget-share", 0.8), {"budget_share": 0.8}),
        (("--budget-macs", 700_000), {"budget_macs": 700_000}),
        (
            ("--max-risk", 0.2, "--risk", "disagreement"),
            {"max_risk": 0.2, "risk": "disagreement"},
        ),
    ],
)
def test_calibrate_writes_the_threshold_that_the_function_finds(skip_run, offramp, options, target):
    outcome = offramp("calibrate", skip_run, *options)
    assert (outcome.code, outcome.stderr) == (0, "")
    loaded = load(skip_run)
    chosen = calibrate(sweep_of(loaded, "calibration"), **target)
    assert loaded.policy.threshold == chosen.threshold
    assert f"threshold {chosen.threshold:.4f} of the gates, chosen on 121 cal" in outcome.stdout
    assert loaded.calibration["reached"] == pytest.approx(
        {"accuracy": chosen.accuracy, "mean_macs": chosen.mean_macs}
    )
    assert loaded.calibration["asked"] == target
    assert loaded.calibration["data"]["num_samples"] == 121


@pytest.mark.parametrize("level", ["0.9", "mean"])
def test_promise_is_printed_and_kept_in_the_run(skip_run, offramp, level):
    outcome = offramp("calibrate", skip_run, "--max-drop", 0.2, "--guarantee", level)
    assert (outcome.code, outcome.stderr) == (0, "")
    promise = load(skip_run).calibration["guarantee"]
    assert "skipping loses at most 20 percentage points" in promise["sentence"]
    assert outcome.stdout.splitlines()[-1] == promise["sentence"]
    assert f"{promise['num_passed']} of 21 candidates passed" in outcome.stdout


def test_evaluate_tells_blocks_and_what_is_saved(skip_run, offramp, figures):
    write_policy(skip_run, GatePolicy(median_probability(skip_run)))
    content = figures("evaluate", skip_run)
    blocks = content["blocks"]
    assert len(blocks["run_rates"]) == 3
    assert 0.1 < blocks["saved"] < 0.9
    assert blocks["saved"] == pytest.approx(1 - sum(blocks["run_rates"]) / 3)
    assert blocks["macs_saved"] == pytest.approx(1 - content["mean_macs"] / content["plain_macs"])
    (whole,) = content["exits"]
    assert (whole["index"], whole["share"]) == (0, 1.0)
    assert whole["accuracy"] == content["final_exit_accuracy"]
    told = offramp("evaluate", skip_run).stdout
    assert f"gated blocks run          {100 * (1 - blocks['saved']):.2f} %" in told
    for rate in blocks["run_rates"]:
        assert f"{100 * rate:.2f} %" in told


def test_plain_network_stands_beside_and_another_with_gates_does_not(
    skip_run, plain_training, figures, refuses
):
    plain = figures("evaluate", plain_training)
    beside = figures("evaluate", skip_run, "--plain", plain_training)
    assert beside["plain_accuracy"] == plain["accuracy"] > 0.5
    assert beside["plain_macs"] == plain["plain_macs"]
    assert "blocks" not in plain
    refuses("evaluate", skip_run, "--plain", skip_run, words=("no gates", "variant=plain"))


def test_frontier_is_that_of_the_sweeps_and_agrees_with_evaluate(skip_run, offramp, figures):
    (curve,) = figures("frontier", skip_run, "--points", 6)["runs"]
    points = curve["points"]
    assert len(points) > 1
    assert (curve["num_samples"], curve["num_calibration_samples"]) == (200, 121)
    assert curve["reliability"] is None
    (threshold,) = points[1]["thresholds"]
    assert offramp("calibrate", skip_run, "--thresholds", threshold).code == 0
    measured = figures("evaluate", skip_run)
    assert measured["accuracy"] == pytest.approx(points[1]["accuracy"])
    assert measured["mean_macs"] == pytest.approx(points[1]["mean_macs"])
    told = offramp("frontier", skip_run, "--points", 3).stdout
    assert told.splitlines()[-1] == "thresholds chosen on 121 calibration samples"


def test_predict_tells_how_many_blocks_ran(skip_run, offramp, workplace):
    Image.fromarray(np.zeros((28, 28), dtype=np.uint8)).save(workplace / "black.png")
    outcome = offramp("predict", skip_run, "black.png")
    assert (outcome.code, outcome.stderr) == (0, "")
    form = r"black.png: \S+  probability 0\.\d+  confidence 0\.\d+ .*  [0-3] of 3 gated blocks  "
    assert re.match(form, outcome.stdout)


def test_time_measures_skipping_against_the_plain_network(skip_run, figures):
    content = figures("time", skip_run, "--batch-size", 100, "--backend", "torch", "--threads", 1)
    (row,) = content["results"]
    assert row["backend"] == "torch"
    assert row["speedup"] == pytest.approx(row["plain_ms"] / row["adaptive_ms"])
    assert min(row["all_exits_ms"], row["never_exit_ms"]) > 0
    assert (row["stage_bound"], row["stage_ms"], content["stage_ms"]) == (None, None, {})


def test_run_can_be_handed_on(skip_run, figures, workplace):
    folder = save_pretrained(skip_run, workplace / "net", evaluation=figures("evaluate", skip_run))
    assert "Which blocks run" in (folder / "README.md").read_text()
    assert load(folder).policy == load(skip_run).policy


# Run in a folder that holds a run that skips blocks (skipping) and nothing else.
REFUSED = {
    "rule": ("calibrate skipping --max-drop 0.1 --rule entropy", ("--rule", "skips blocks")),
    "pixels": (
        "calibrate skipping --thresholds 0.5 --pixel-threshold 0.7",
        ("--pixel-threshold", "leave"),
    ),
    "patience": ("calibrate skipping --max-drop 0.1 --patience 2", ("--patience", "leave")),
    "temperatures": ("calibrate skipping --max-drop 0.1 --temperatures all", ("--temperatures",)),
    "latency": ("calibrate skipping --max-drop 0.1 --for latency", ("--for latency", "exits")),
    "milliseconds": ("calibrate skipping --budget-ms 3", ("--budget-ms", "share one threshold")),
    "two thresholds": ("calibrate skipping --thresholds 0.4,0.5", ("one number", "'0.4,0.5'")),
    "off": ("calibrate skipping --thresholds off", ("one number in [0, 1]", "'off'")),
    "too high": ("calibrate skipping --thresholds 1.5", ("one number in [0, 1]", "'1.5'")),
    "too cheap": ("calibrate skipping --budget-macs 10", ("at least", "cheapest")),
    "too sure": (
        "calibrate skipping --max-drop 0.001 --guarantee 0.99",
        ("121 calibration samples cannot promise", "would do"),
    ),
    "place": ("place skipping --num-exits 2", ("skips blocks", "network with exits")),
}


@pytest.mark.parametrize(("command", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_about_exits_is_refused_in_a_line(skip_run, refuses, command, words):
    refuses(*command.split(), words=words)
