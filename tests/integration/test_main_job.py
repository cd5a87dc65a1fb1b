"""The main job on real digits: train, calibrate, evaluate, time, predict."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from offramp.recipes.exits import find_recipe

EVALUATION_KEYS = {
    "recipe",
    "split",
    "num_samples",
    "accuracy",
    "mean_macs",
    "plain_macs",
    "final_exit_accuracy",
    "plain_accuracy",
    "exits",
    "drop",
}
TIMING_KEYS = {
    "hardware",
    "threads",
    "versions",
    "shares",
    "mean_macs",
    "stage_ms",
    "results",
}
RESULT_KEYS = {
    "backend",
    "batch_size",
    "plain_ms",
    "all_exits_ms",
    "adaptive_ms",
    "never_exit_ms",
    "interval_ms",
    "ideal_speedup",
    "speedup",
    "realised",
    "stage_bound",
    "stage_ms",
    "num_samples",
    "rounds",
    "speedup_interval",
}
PLAIN_MACS = 64 * 128 + 128 * 256 + 256 * 256 + 256 * 10
FIRST_EXIT_MACS = 64 * 128 + 128 * 10


@pytest.fixture
def evaluate(offramp):
    """Evaluate a run with the given options and return the figures."""

    def figures(*arguments):
        outcome = offramp("evaluate", *arguments, "--json", "-")
        assert (outcome.code, outcome.stderr) == (0, "")
        return json.loads(outcome.stdout)

    return figures


@pytest.fixture(scope="session")
def digits_test_split():
    """The test images, 8x8 with light strokes, and their labels, cut as the data set is."""
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    _, images, _, labels = train_test_split(
        images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    return images, labels


def test_training_leaves_a_run_folder_and_says_where(training):
    folder, outcome = training
    assert {path.name for path in folder.iterdir()} == {
        "recipe.json",
        "model.safetensors",
        "metrics.jsonl",
        "last.ckpt",
        "logs",
    }
    assert outcome.stderr == ""
    assert outcome.stdout.splitlines()[-1] == f"trained digits-mlp: {folder}"


def test_training_records_every_epoch(training):
    lines = (training[0] / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in records] == list(range(1, 9))
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert all(0.5 < accuracy < 1 for accuracy in records[-1]["exit_accuracy"])
    assert len(records[-1]["exit_accuracy"]) == 3


def test_training_without_calibration_data_is_quiet(workplace, offramp):
    outcome = offramp(
        "train",
        "--epochs",
        1,
        "--set",
        "calibration_share=0",
        "--set",
        "widths=8,8",
        "--out",
        "new",
    )
    assert (outcome.code, outcome.stderr) == (0, "")


def test_set_seed_is_the_same_as_seed(workplace, offramp):
    options = ("train", "--epochs", 1, "--set", "widths=8,8")
    assert offramp(*options, "--seed", 5, "--out", "by-option").code == 0
    assert offramp(*options, "--set", "seed=5", "--out", "by-setting").code == 0
    by_option, by_setting = (
        (workplace / name / "model.safetensors").read_bytes()
        for name in ("by-option", "by-setting")
    )
    assert by_setting == by_option


def test_evaluate_writes_pure_json_with_the_agreed_keys(
    calibrated_run, start_offramp, finish_offramp
):
    outcome = finish_offramp(start_offramp("evaluate", calibrated_run, "--json", "-"))
    assert (outcome.code, outcome.stderr) == (0, "")
    figures = json.loads(outcome.stdout)
    assert set(figures) == EVALUATION_KEYS
    assert all(set(row) == {"index", "accuracy", "share", "macs"} for row in figures["exits"])
    assert (figures["recipe"], figures["split"], figures["num_samples"]) == (
        "digits-mlp",
        "test",
        450,
    )
    assert figures["plain_accuracy"] is None


def test_evaluation_figures_agree_with_each_other(calibrated_run, evaluate):
    figures = evaluate(calibrated_run)
    rows = figures["exits"]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert all(row["share"] > 0.02 for row in rows)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    expected = sum(row["share"] * row["macs"] for row in rows)
    assert figures["mean_macs"] == pytest.approx(expected, rel=1e-4)
    assert figures["plain_macs"] == PLAIN_MACS
    assert rows[0]["macs"] == FIRST_EXIT_MACS
    assert rows[2]["accuracy"] == figures["final_exit_accuracy"]
    assert 0.8 < figures["accuracy"] < 1


def test_evaluate_prints_a_table_and_writes_the_same_figures_to_a_file(
    calibrated_run, offramp, evaluate
):
    outcome = offramp("evaluate", calibrated_run, "--json", calibrated_run / "figures.json")
    figures = json.loads((calibrated_run / "figures.json").read_text())
    assert figures == evaluate(calibrated_run)
    assert f"{100 * figures['accuracy']:.2f} %" in outcome.stdout
    assert f"{figures['mean_macs']:,.0f}" in outcome.stdout
    assert "digits-mlp, test, 450 samples" in outcome.stdout
    assert max(map(len, outcome.stdout.splitlines())) <= 80


def test_calibrate_says_where_samples_cannot_tell(workplace, run, offramp):
    few = ("--epochs", 1, "--set", "widths=8,8", "--set", "calibration_share=0.05", "--out", "few")
    assert offramp("train", *few).code == 0
    told = offramp("calibrate", "few", "--max-drop", 0.01)
    assert (told.code, told.stderr) == (0, "")
    assert re.search(
        r"warning: 70 calibration samples cannot tell a drop of 1 point.* --guarantee", told.stdout
    )
    assert "warning" not in offramp("calibrate", run, "--max-drop", 0.01).stdout  # 269 samples


def test_thresholds_by_hand_decide_who_leaves(run, offramp, evaluate):
    offramp("calibrate", run, "--thresholds", "inf,0")
    shares = [row["share"] for row in evaluate(run)["exits"]]
    assert shares == [0, 1, 0]


def test_an_exit_that_is_off_costs_nothing(run, offramp, evaluate):
    offramp("calibrate", run, "--thresholds", "inf,inf")
    assert evaluate(run)["mean_macs"] == PLAIN_MACS


def test_entropy_in_nats_is_the_tutorials_rule(run, offramp):
    offramp("calibrate", run, "--thresholds", "0.1,0.5", "--rule", "entropy_nats")
    policy = json.loads((run / "policy.json").read_text())["policy"]
    expected = [1 - nats / np.log(10) for nats in (0.1, 0.5)]
    assert policy["rule"] == "entropy"
    assert policy["thresholds"] == pytest.approx(expected)


def test_max_drop_holds_on_the_calibration_data(run, offramp, evaluate):
    assert offramp("calibrate", run, "--max-drop", 0.01).code == 0
    policy = json.loads((run / "policy.json").read_text())
    there = evaluate(run, "--split", "calibration", "--in-sample")
    assert policy["asked"]["max_drop"] == 0.01
    assert policy["data"]["num_samples"] == there["num_samples"]
    assert policy["reached"]["accuracy"] == pytest.approx(there["accuracy"])
    assert there["accuracy"] >= there["final_exit_accuracy"] - 0.01
    assert there["asked"] == {
        "target": "max_drop",
        "limit": 0.01,
        "num_samples": there["num_samples"],
        "risk": None,
        "guarantee": None,
    }
    lost = there["final_exit_accuracy"] - there["accuracy"]
    assert there["got"] == there["drop"]
    assert there["got"]["value"] == pytest.approx(lost)
    assert there["got"]["low"] < lost < there["got"]["high"]
    assert there["mean_macs"] < PLAIN_MACS


def test_budget_holds_on_the_calibration_data(run, offramp, evaluate):
    budget_macs = 50_000
    assert offramp("calibrate", run, "--budget-macs", budget_macs).code == 0
    there = evaluate(run, "--split", "calibration", "--in-sample")
    reached = json.loads((run / "policy.json").read_text())["reached"]
    assert FIRST_EXIT_MACS < there["mean_macs"] <= budget_macs
    assert reached["mean_macs"] == pytest.approx(there["mean_macs"])


@pytest.mark.parametrize("split", ["calibration", "train"])
def test_figures_on_seen_data_are_refused_unless_asked_for_and_labelled(
    run, offramp, refuses, evaluate, split
):
    offramp("calibrate", run, "--max-drop", 0.01)
    refuses("evaluate", run, "--split", split, words=("--in-sample", "--split test"))
    assert evaluate(run, "--split", split, "--in-sample")["in_sample"] is True
    table = offramp("evaluate", run, "--split", split, "--in-sample").stdout
    assert "IN SAMPLE" in table


def test_a_plain_network_trained_as_long_stands_beside(
    calibrated_run, offramp, evaluate, train_command
):
    trained = offramp(*train_command, "--set", "variant=plain", "--out", "plain")
    assert (trained.code, trained.stderr) == (0, "")
    plain = evaluate("plain")
    assert len(plain["exits"]) == 1
    assert plain["mean_macs"] == plain["plain_macs"] == PLAIN_MACS
    beside = evaluate(calibrated_run, "--plain", "plain")
    assert beside["plain_accuracy"] == plain["accuracy"]
    assert beside["rival"] == {"name": "plain", "macs": PLAIN_MACS}
    assert f"at its own {PLAIN_MACS:,} MACs" in offramp(
        "evaluate", calibrated_run, "--plain", "plain"
    ).stdout.replace("\n", " ")


def test_a_static_network_is_smaller_and_needs_no_policy(workplace, offramp, evaluate):
    offramp("train", "--epochs", 1, "--set", "variant=static", "--out", "static")
    figures = evaluate("static")
    costs = find_recipe("digits-mlp").build_network().costs(torch.zeros(1, 1, 8, 8))
    assert figures["mean_macs"] == figures["plain_macs"] < costs.plain_macs
    timed = offramp("time", "static", "--batch-size", 32, "--json", "-")
    assert timed.code == 0, timed.stderr


def test_time_writes_the_agreed_keys(calibrated_run, offramp):
    threads = torch.get_num_threads()
    try:
        outcome = offramp(
            "time", calibrated_run, "--batch-size", "1,32", "--threads", 1, "--json", "-"
        )
    finally:
        torch.set_num_threads(threads)
    timing = json.loads(outcome.stdout)
    assert set(timing) == TIMING_KEYS
    assert timing["threads"] == 1
    assert sum(timing["shares"]) == pytest.approx(1)
    assert {size: len(stages) for size, stages in timing["stage_ms"].items()} == {"1": 3, "32": 3}
    assert [row["batch_size"] for row in timing["results"]] == [1, 32]
    for row in timing["results"]:
        assert set(row) == RESULT_KEYS
        assert row["speedup"] == pytest.approx(row["plain_ms"] / row["adaptive_ms"])
        assert row["realised"] == pytest.approx(row["speedup"] / row["ideal_speedup"])


def test_time_prints_a_table_with_hardware_and_threads(calibrated_run, offramp):
    stdout = offramp("time", calibrated_run, "--batch-size", 32).stdout
    assert "milliseconds" in stdout
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in stdout


def test_a_folder_of_parquet_files_gives_the_figures_of_the_bundled_data(
    calibrated_run, digits_test_split, evaluate, write_parquet
):
    write_parquet("data/test.parquet", *digits_test_split)
    assert evaluate(calibrated_run, "--data", "data") == evaluate(calibrated_run)


def test_labels_that_the_network_lacks_are_refused_in_evaluation(
    calibrated_run, digits_test_split, refuses, write_parquet
):
    images, _ = digits_test_split
    write_parquet("data/test.parquet", images[:2], [3, 12])
    refuses("evaluate", calibrated_run, "--data", "data", words=("12", "[0, 9]"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory, digits_test_split):
    """One test digit of each class, written as a user would have it, by kind of picture."""
    folder = tmp_path_factory.mktemp("pictures")
    images, labels = digits_test_split
    kinds = {"light.png": [], "light.jpg": [], "dark.png": [], "off-centre.png": []}
    for label in range(10):
        small = Image.fromarray(images[labels == label][0])
        light = small.resize((200, 200), Image.Resampling.BICUBIC)
        dark = ImageOps.invert(light).convert("RGB")
        made = {
            "light.png": light,
            "light.jpg": light,
            "dark.png": dark,
            "off-centre.png": ImageOps.expand(dark, (10, 20, 130, 60), "white"),
        }
        for kind, picture in made.items():
            path = folder / f"{label}-{kind}"
            picture.save(path)
            kinds[kind].append(path)
    return kinds


@pytest.mark.parametrize("kind", ["light.png", "light.jpg", "dark.png", "off-centre.png"])
def test_predict_reads_enlarged_digits(run, offramp, pictures, kind):
    offramp("calibrate", run, "--thresholds", "inf,inf")
    outcome = offramp("predict", run, *pictures[kind])
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    form = re.compile(
        r"(.+): (\d)  probability (\d\.\d+)  confidence (\d\.\d+) \(rule entropy\)  exit 2  "
        r"100\.00 % of the plain network's MACs"
    )
    found = [form.fullmatch(line) for line in lines]
    assert [match[1] for match in found] == [str(path) for path in pictures[kind]]
    assert all(0.1 <= float(match[3]) <= 1 and 0 <= float(match[4]) <= 1 for match in found)
    assert sum(match[2] == str(label) for label, match in enumerate(found)) >= 8


def test_predict_names_a_class_by_its_number_where_it_has_no_name(
    calibrated_run, offramp, pictures, edit_json
):
    named = offramp("predict", calibrated_run, *pictures["dark.png"])
    edit_json(calibrated_run / "recipe.json", class_names=[])
    assert offramp("predict", calibrated_run, *pictures["dark.png"]) == named


def test_a_run_folder_can_be_moved(calibrated_run, evaluate):
    before = evaluate(calibrated_run)
    moved = shutil.move(calibrated_run, calibrated_run.parent / "elsewhere")
    assert evaluate(moved) == before


def test_recipes_lists_every_recipe_with_its_data(offramp):
    stdout = offramp("recipes").stdout
    assert "digits-mlp" in stdout
    assert "emnist-mlp" in stdout
    assert "data emnist47" in stdout


def test_exits_can_be_switched_off_by_a_word(run, offramp, evaluate):
    for rule, value in (("entropy", "0.5"), ("entropy_nats", "0.8")):
        asked = ("calibrate", run, "--thresholds", f"off,{value}", "--rule", rule)
        assert offramp(*asked).code == 0
        figures = evaluate(run)
        assert figures["exits"][0]["share"] == 0
        spent = sum(row["share"] * row["macs"] for row in figures["exits"])
        assert spent == pytest.approx(figures["mean_macs"])
