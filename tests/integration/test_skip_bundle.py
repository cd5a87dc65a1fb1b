"""A run of a network that skips blocks, exported by the command line, and its bundle as a run.

Its gates are drawn at random and nothing is trained: what matters is that both say the same.
"""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from offramp import GatePolicy, SkipRunner, load
from offramp.model.checkpoint import save_weights
from offramp.recipes.exits import find_recipe
from offramp.recipes.recipe import Recipe
from offramp.runs.run import (
    WEIGHTS_FILE,
    create_folder,
    load_batches,
    write_policy,
    write_recipe,
)
from offramp.runtime import Session, read_bundle


def skipping_recipe():
    """Three gates, on the digits that need no download."""
    settings = {
        "in_channels": 1,
        "widths": (8, 16),
        "blocks": (2, 2),
        "num_classes": 10,
        "gates": "recurrent",
    }
    digits = find_recipe("digits-mlp")
    return Recipe(
        name="digits-skipnet",
        summary="",
        expected="",
        data="digits",
        network="skipnet",
        network_options=settings,
        normalisation=digits.normalisation,
        calibration_share=0.2,
        fit=find_recipe("emnist-skipnet").fit,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory, offramp):
    """A run with its bundle: a folder to copy from, and what the command printed."""
    recipe = skipping_recipe()
    torch.manual_seed(0)
    network = recipe.build_network().eval()
    for parameter in network.gates.parameters():  # gates that tell images apart
        nn.init.normal_(parameter)
    images, _ = load_batches(recipe, "test")[0].__getitems__(list(range(200)))
    with torch.no_grad():
        threshold = float(network(images).probability.median())
    folder = create_folder(tmp_path_factory.mktemp("exported") / "run")
    write_recipe(folder, recipe=recipe, class_names=tuple("0123456789"), data=None)
    save_weights(network, folder / WEIGHTS_FILE)
    write_policy(folder, GatePolicy(threshold))
    outcome = offramp("export", folder)
    assert (outcome.code, outcome.stderr) == (0, "")
    return folder, outcome.stdout


@pytest.fixture
def run(workplace, exported):
    return shutil.copytree(exported[0], workplace / "run")


def test_export_says_what_was_compared(exported):
    _, told = exported
    assert told.startswith("3 steps answer 269 samples as torch does: logits within")


def test_session_answers_as_the_run_does(run):
    loaded = load(run)
    images, _ = load_batches(loaded.require_recipe(), "test")[0].__getitems__(list(range(100)))
    expected = SkipRunner(loaded.network, loaded.policy).run(images)
    found = Session(run / "bundle").run(images)
    assert found.blocks.tolist() == expected.blocks.tolist()
    assert 0.1 < found.blocks.mean() < 0.9


def test_evaluate_says_the_same_of_run_and_bundle(run, figures_of, offramp):
    of_run, of_bundle = figures_of("evaluate", run), figures_of("evaluate", run / "bundle")
    assert 0.1 < of_run["blocks"]["saved"] < 0.9
    assert of_bundle == of_run
    table_of_run, table_of_bundle = offramp("evaluate", run), offramp("evaluate", run / "bundle")
    assert table_of_bundle.stdout == table_of_run.stdout


def test_a_bundle_is_calibrated_and_drawn_as_its_run(run, offramp, figures_of):
    of_run, of_bundle = (
        figures_of("frontier", folder, "--points", 3)["runs"][0] for folder in (run, run / "bundle")
    )
    for found, expected in zip(of_bundle["points"], of_run["points"], strict=True):
        assert found["thresholds"] == expected["thresholds"]
        assert found["mean_macs"] == pytest.approx(expected["mean_macs"], rel=0.01)
    for folder in (run, run / "bundle"):
        outcome = offramp("calibrate", folder, "--max-drop", 0.2, "--guarantee", 0.9)
        assert (outcome.code, outcome.stderr) == (0, "")
        assert "of the gates, chosen on 269 calibration samples" in outcome.stdout
        assert "skipping loses at most 20 percentage points" in outcome.stdout
    bundle = read_bundle(run / "bundle")
    front, promise = bundle.calibration.front, bundle.calibration.guarantee
    assert front.points[0].thresholds == (0.0,)
    assert front.points[front.passed - 1].thresholds == (bundle.skip.threshold,)
    assert front.passed == promise["num_passed"] > 1
    of_run = load(run).calibration
    assert offramp("export", run).code == 0
    exported = read_bundle(run / "bundle").calibration
    assert (len(exported.front.points), exported.front.passed) == (
        len(of_run["front"]["points"]),
        of_run["front"]["passed"],
    )
    assert exported.data.hashes == of_run["data"]["hashes"]


def test_predict_prints_the_same_lines_for_run_and_bundle(run, offramp):
    pictures = []
    for number, pixels in enumerate(load_digits().images[:6]):
        pictures.append(run / f"{number}.png")
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(pictures[-1])
    of_run, of_bundle = (
        offramp("predict", run, *pictures),
        offramp("predict", run / "bundle", *pictures),
    )
    assert (of_bundle.code, of_bundle.stderr) == (0, "")
    assert of_bundle.stdout == of_run.stdout
    assert "of 3 gated blocks" in of_run.stdout


def test_a_bundle_is_timed_alone(run, figures_of):
    timing = figures_of("time", run / "bundle", "--batch-size", "1,64", "--threads", 1)
    found = [(row["backend"], row["batch_size"]) for row in timing["results"]]
    assert found == [("onnxruntime", 1), ("onnxruntime", 64)]
    for row in timing["results"]:
        assert min(row["plain_ms"], row["all_exits_ms"], row["never_exit_ms"]) > 0
        assert (row["stage_bound"], row["stage_ms"]) == (None, None)
    evaluated = figures_of("evaluate", run / "bundle")
    assert timing["mean_macs"] == pytest.approx(evaluated["mean_macs"])


def test_engines_are_timed_in_turn_each_in_its_own_process(run, figures_of):
    engines = ("--backend", "torch,onnxruntime", "--threads", 1)
    timing = figures_of("time", run, *engines, "--batch-size", "64")
    assert [row["backend"] for row in timing["results"]] == ["torch", "onnxruntime"]


def test_a_bundle_of_an_older_policy_is_not_timed_with_the_run(run, offramp, refuses):
    assert offramp("calibrate", run, "--thresholds", "0.123").code == 0
    words = ("another policy", "offramp export RUN")
    refuses("time", run, "--backend", "onnxruntime", "--batch-size", "64", words=words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("export run --quantize int8 --out int8", ("--quantize", "threshold of gates")),
        ("evaluate run/bundle --plain run/bundle", ("--plain", "gates")),
    ],
)
def test_what_is_about_exits_is_refused_in_a_line(run, refuses, command, words):
    refuses(*command.split(), words=words)


@pytest.mark.parametrize("command", ["evaluate", "time"])
def test_incomplete_bundle_is_refused(run, refuses, command):
    (run / "bundle" / read_bundle(run / "bundle").skip.steps[1].block.name).unlink()
    refuses(command, run / "bundle", words=("run/bundle/block_1.onnx", "missing"))


def test_bundle_that_answers_otherwise_than_its_gates_is_not_timed(run, refuses, monkeypatch):
    answer = Session.run_every_block

    def another(session, *inputs):
        output, blocks, probability = answer(session, *inputs)
        return output, ~blocks, probability

    monkeypatch.setattr(Session, "run_every_block", another)
    refuses("time", run / "bundle", words=("Nothing was timed",))
