"""A network whose tokens halt through the commands, as a run and as a bundle.

Its weights are drawn at random and nothing is trained: what matters is that all say the same.
"""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from offramp import HaltingPolicy, HaltingRunner, calibrate, collect, load
from offramp.data.images import make_loader
from offramp.model.checkpoint import save_weights
from offramp.recipes.exits import find_recipe
from offramp.recipes.recipe import Recipe
from offramp.runs.hub import save_pretrained
from offramp.runs.run import (
    WEIGHTS_FILE,
    create_folder,
    load_batches,
    write_policy,
    write_recipe,
)
from offramp.runtime import Session

OPTIONS = {
    "in_channels": 1,
    "side": 8,
    "patch": 2,
    "width": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 10,
    "gate_scale": 0.2,
    "gate_center": 1.6,
}


def halting_recipe(**options):
    """On the digits that need no download."""
    digits, avit = find_recipe("digits-mlp"), find_recipe("emnist-avit")
    return Recipe(
        name="digits-avit",
        summary="",
        expected="",
        data="digits",
        network="vit",
        network_options={**OPTIONS, **options},
        normalisation=digits.normalisation,
        calibration_share=0.2,
        fit=avit.fit,
    )


def write_run(folder, recipe):
    torch.manual_seed(0)
    network = recipe.build_network().eval()
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.4)
    create_folder(folder)
    write_recipe(folder, recipe=recipe, class_names=tuple("0123456789"), data=None)
    save_weights(network, folder / WEIGHTS_FILE)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, offramp):
    """A run with its bundle: a folder to copy from, and what the command printed."""
    folder = write_run(tmp_path_factory.mktemp("exported") / "run", halting_recipe())
    write_policy(folder, HaltingPolicy(0.7))
    outcome = offramp("export", folder)
    assert (outcome.code, outcome.stderr) == (0, "")
    return folder, outcome.stdout


@pytest.fixture
def run(workplace, exported):
    return shutil.copytree(exported[0], workplace / "run")


@pytest.fixture
def plain_run(workplace):
    return write_run(workplace / "plain", halting_recipe(num_exits=1))


@pytest.fixture
def pictures(workplace):
    files = []
    for number, pixels in enumerate(load_digits().images[:6]):
        files.append(workplace / f"{number}.png")
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(files[-1])
    return files


def sweep_of(loaded, split):
    batches, _, _ = load_batches(loaded.recipe, split, loaded.data)
    return collect(loaded.network, make_loader(batches, batch_size=256), thresholds="auto")


@pytest.mark.parametrize(
    ("options", "target"),
    [
        (("--max-drop", 0.05), {"max_drop": 0.05}),
        (("--budget-share", 0.8), {"budget_share": 0.8}),
        (("--max-risk", 0.9, "--risk", "disagreement"), {"max_risk": 0.9, "risk": "disagreement"}),
    ],
)
def test_calibrate_writes_the_threshold_that_the_function_finds(run, offramp, options, target):
    outcome = offramp("calibrate", run, *options)
    assert (outcome.code, outcome.stderr) == (0, "")
    loaded = load(run)
    chosen = calibrate(sweep_of(loaded, "calibration"), **target)
    assert loaded.policy == HaltingPolicy(chosen.threshold)
    assert f"threshold {chosen.threshold:.4f} of the tokens, chosen on" in outcome.stdout
    assert loaded.calibration["reached"] == pytest.approx(
        {"accuracy": chosen.accuracy, "mean_macs": chosen.mean_macs}
    )
    assert loaded.calibration["asked"] == target


def test_promise_is_printed_and_kept_in_the_run(run, offramp):
    outcome = offramp("calibrate", run, "--max-drop", 0.3, "--guarantee", 0.9)
    assert (outcome.code, outcome.stderr) == (0, "")
    promise = load(run).calibration["guarantee"]
    assert "dropping tokens loses at most 30 percentage points" in promise["sentence"]
    assert "the network with a threshold of 1" in promise["sentence"]
    assert f"{promise['num_passed']} of 21 candidates passed" in outcome.stdout


def test_evaluate_tells_tokens_depth_and_what_is_saved(run, offramp, figures_of, plain_run):
    content = figures_of("evaluate", run, "--plain", plain_run)
    tokens = content["tokens"]
    assert tokens["per_layer"][0] == 17
    assert tokens["per_layer"] == sorted(tokens["per_layer"], reverse=True)
    assert 0 < tokens["per_layer"][-1] < 16
    assert tokens["mean_depth"] == pytest.approx(sum(tokens["per_layer"]) / 17)
    assert tokens["macs_saved"] == pytest.approx(1 - content["mean_macs"] / content["plain_macs"])
    assert 0.05 < tokens["macs_saved"] < 0.9
    assert content["plain_accuracy"] == figures_of("evaluate", plain_run)["accuracy"]
    assert "blocks" not in content
    told = offramp("evaluate", run).stdout
    assert f"mean depth of a token     {tokens['mean_depth']:.2f} of 4 layers" in told
    assert "accuracy, tokens dropped" in told


def test_frontier_is_that_of_the_sweeps_and_agrees_with_evaluate(run, offramp, figures_of):
    (curve,) = figures_of("frontier", run, "--points", 6)["runs"]
    points = curve["points"]
    assert len(points) > 1
    assert curve["reliability"] is None
    assert curve["exits"][0]["macs"] <= curve["plain_macs"]
    (threshold,) = points[1]["thresholds"]
    assert offramp("calibrate", run, "--thresholds", threshold).code == 0
    measured = figures_of("evaluate", run)
    assert measured["accuracy"] == pytest.approx(points[1]["accuracy"])
    assert measured["mean_macs"] == pytest.approx(points[1]["mean_macs"])


def test_export_says_what_was_compared(exported):
    _, told = exported
    assert re.match(r"4 steps answer \d+ samples as torch does: logits within", told)


def test_layers_can_share_a_step(run, offramp, figures_of):
    outcome = offramp("export", run, "--layers-per-step", 3, "--no-plain", "--out", "coarse")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.startswith("2 steps answer")
    fine, coarse = (figures_of("evaluate", bundle) for bundle in (run / "bundle", "coarse"))
    assert coarse["accuracy"] == pytest.approx(fine["accuracy"], abs=0.01)
    assert coarse["tokens"]["per_layer"][:3] == [17.0] * 3
    assert coarse["mean_macs"] > fine["mean_macs"]


def test_session_answers_as_the_run_does(run):
    loaded = load(run)
    images, _ = load_batches(loaded.require_recipe(), "test")[0].__getitems__(list(range(100)))
    expected = HaltingRunner(loaded.network, loaded.policy).run(images)
    found = Session(run / "bundle").run(images)
    assert (found.tokens == expected.tokens.numpy()).all(1).sum() >= 99


def test_evaluate_says_the_same_of_run_and_bundle(run, figures_of, offramp):
    of_run, of_bundle = figures_of("evaluate", run), figures_of("evaluate", run / "bundle")
    assert of_bundle["accuracy"] == of_run["accuracy"]
    assert of_bundle["final_exit_accuracy"] == of_run["final_exit_accuracy"]
    assert of_bundle["tokens"]["per_layer"] == pytest.approx(
        of_run["tokens"]["per_layer"], abs=0.01
    )
    assert offramp("evaluate", run / "bundle").stdout.count("\n") > 5


def test_predict_prints_the_same_lines_for_run_and_bundle(run, offramp, pictures):
    of_run = offramp("predict", run, *pictures)
    of_bundle = offramp("predict", run / "bundle", *pictures)
    assert (of_bundle.code, of_bundle.stderr) == (0, "")
    assert of_bundle.stdout == of_run.stdout
    assert re.search(
        r"confidence 0\.\d+ \(rule max_probability\)  [1-4]\.\d\d of 4 layers a token  ",
        of_run.stdout,
    )


@pytest.mark.parametrize("backend", ["torch", "torch,onnxruntime"])
def test_time_measures_dropping_against_the_plain_network(run, figures_of, backend):
    options = ("--batch-size", "1,64", "--backend", backend, "--threads", 1)
    content = figures_of("time", run, *options)
    assert {row["backend"] for row in content["results"]} == set(backend.split(","))
    for row in content["results"]:
        assert row["speedup"] == pytest.approx(row["plain_ms"] / row["adaptive_ms"])
        assert min(row["all_exits_ms"], row["never_exit_ms"]) > 0
        assert (row["stage_bound"], row["stage_ms"]) == (None, None)


def test_a_bundle_is_timed_alone(run, figures_of):
    timing = figures_of("time", run / "bundle", "--batch-size", "1,64", "--threads", 1)
    assert [row["batch_size"] for row in timing["results"]] == [1, 64]
    evaluated = figures_of("evaluate", run / "bundle")
    assert timing["mean_macs"] == pytest.approx(evaluated["mean_macs"])


def test_run_can_be_handed_on(run, figures_of, workplace):
    folder = save_pretrained(run, workplace / "net", evaluation=figures_of("evaluate", run))
    card = (folder / "README.md").read_text()
    assert "When a token halts" in card
    assert "| layer | tokens in it |" in card
    assert load(folder).policy == HaltingPolicy(0.7)


def test_without_a_policy_tokens_halt_as_in_training(plain_run, workplace):
    folder = write_run(workplace / "new", halting_recipe())
    assert load(folder).policy == HaltingPolicy(0.99)


# Drawing


def test_show_draws_how_far_each_patch_goes(run, offramp, pictures, workplace):
    outcome = offramp("show", run, "--image", pictures[0])
    assert (outcome.code, outcome.stderr) == (0, "")
    first, per_layer, where = outcome.stdout.splitlines()
    assert first == offramp("predict", run, pictures[0]).stdout.rstrip()
    assert per_layer.startswith("tokens in each layer: 17 ")
    assert where == "drawn in 0-depth.png"
    with Image.open(workplace / "0-depth.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 2 * 336
    assert offramp("show", run, "--image", pictures[1], "--out", "here.png").code == 0
    assert (workplace / "here.png").is_file()


# Run in a folder with a run whose tokens halt (run), its plain network (plain), and pictures.
REFUSED = {
    "rule": ("calibrate run --max-drop 0.1 --rule entropy", ("--rule", "drops tokens")),
    "latency": ("calibrate run --max-drop 0.1 --for latency", ("--for latency", "exits")),
    "two thresholds": ("calibrate run --thresholds 0.4,0.5", ("one number", "'0.4,0.5'")),
    "too high": ("calibrate run --thresholds 1.5", ("one number in [0, 1]", "'1.5'")),
    "too cheap": ("calibrate run --budget-macs 10", ("at least", "cheapest")),
    "place": ("place run --num-exits 2", ("drops tokens", "network with exits")),
    "int8": ("export run --quantize int8", ("--quantize", "halting")),
    "steps": ("export run --layers-per-step 9", ("layers_per_step", "[1, 4]")),
    "rival": ("evaluate run --plain run", ("no halting", "variant=plain")),
    "nothing to draw": ("show plain --image 0.png", ("tokens halt", "nothing to draw")),
    "bundle": ("show run/bundle --image 0.png", ("is a bundle", "Give the run")),
    "no image": ("show run --image nowhere.png", ("no image file nowhere.png",)),
    "text": ("show run --image run/recipe.json", ("unreadable",)),
    "not a picture": ("show run --image 0.png --out depth.txt", ("--out", ".png")),
}


@pytest.mark.parametrize(("command", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_in_a_line(run, plain_run, pictures, refuses, command, words):
    refuses(*command.split(), words=words)
