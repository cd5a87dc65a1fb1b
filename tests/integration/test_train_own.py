"""``offramp train --network``: a network and pictures of one's own, trained as a recipe is."""

import json
import shutil

import pytest
from own_pictures import NAMES, write_pictures

from offramp.runtime import read_bundle

NET = """
from layers import layer
from torch import nn

import offramp

preprocessing = offramp.Preprocessing(height=8, width=8, channels=1, mean=0.3, deviation=0.35)


def build(num_classes):
    return nn.Sequential(
        layer(64, 64), layer(64, 64), layer(64, 64), nn.Linear(64, num_classes)
    )


def with_exits():
    import torch

    return offramp.add_exits(
        build(10), at=["0"], num_classes=10, example=torch.zeros(2, 1, 8, 8)
    )


def other(num_classes):
    return nn.Sequential(layer(64, 32), layer(32, 32), layer(32, 32), nn.Linear(32, num_classes))


def broken():
    raise KeyError("no such layer")


def nothing():
    return None
"""
LAYERS = """
from torch import nn


def layer(wide, narrow):
    return nn.Sequential(nn.Flatten(), nn.Linear(wide, narrow), nn.ReLU())
"""
NETWORK = ("--network", "net.py:build")
TRAIN = ("train", *NETWORK, "--exits", "3", "--data", "pictures", "--epochs", "3")
SETTINGS = ("--set", "batch_size=32", "--set", "learning_rate=0.01", "--device", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory, offramp):
    folder = tmp_path_factory.mktemp("own")
    write_pictures(folder / "pictures")
    (folder / "net.py").write_text(NET)
    (folder / "layers.py").write_text(LAYERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome = offramp(*TRAIN, *SETTINGS)
    assert outcome.code == 0, outcome.stderr
    assert "trained net.py:build: runs/net" in outcome.stdout
    assert outcome.stdout.count("%") >= 3  # of validation pictures, an epoch
    return folder


@pytest.fixture
def run(made, workplace):
    """The trained run, beside the file and the pictures."""
    shutil.copytree(made / "runs" / "net", workplace / "run")
    for name in ("net.py", "layers.py"):
        shutil.copy(made / name, workplace)
    (workplace / "pictures").symlink_to(made / "pictures")
    return workplace / "run"


def test_a_trained_run_goes_on_to_a_bundle(run, offramp, figures_of):
    outcome = offramp("calibrate", run, *NETWORK, "--max-drop", "0.01")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "chosen on 700 calibration samples" in outcome.stdout
    figures = figures_of("evaluate", run, *NETWORK)
    assert (figures["recipe"], figures["data"], figures["split"]) == (None, "pictures", "test")
    assert figures["final_exit_accuracy"] > 0.8
    outcome = offramp("export", run, *NETWORK)
    assert (outcome.code, outcome.stderr) == (0, "")
    bundle = read_bundle(run / "bundle")
    assert (bundle.recipe, bundle.class_names) == (None, NAMES)
    again = figures_of("evaluate", run / "bundle", "--data", "pictures")
    assert again["accuracy"] == pytest.approx(figures["accuracy"], abs=0.003)
    picture = next((run.parent / "pictures" / "test" / "four").glob("*.png"))
    said = [offramp("predict", *of, picture) for of in ((run, *NETWORK), (run / "bundle",))]
    assert said[0].stdout == said[1].stdout
    curve = figures_of("frontier", run, *NETWORK, "--points", "2")["runs"][0]
    assert (curve["recipe"], curve["num_samples"]) == (None, 397)
    timing = figures_of("time", run, *NETWORK, "--batch-size", "8")
    assert timing["mean_macs"] == pytest.approx(figures["mean_macs"])
    placed = figures_of("place", run, *NETWORK, "--num-exits", "2")
    assert len(placed["at"]) == 1


def test_a_run_names_no_file_and_asks_for_it_again(run, refuses):
    assert "net.py" not in (run / "recipe.json").read_text()
    for command in (("evaluate",), ("calibrate", "--max-drop", "0.01"), ("export",), ("time",)):
        name, *options = command
        refuses(name, run, *options, words=("network of your own", "--network FILE.py:function"))
    refuses("evaluate", run, "--network", "net.py:other", words=("another network",))


def test_another_network_is_refused(run, refuses):
    (run.parent / "net.py").write_text(NET.replace("64, 64", "64, 63, 64"))
    refuses("evaluate", run, *NETWORK, words=("net.py:build", "TypeError"))


def test_a_network_with_exits_keeps_them(run, offramp, refuses):
    train = ("train", "--network", "net.py:with_exits", "--data", "pictures", "--epochs", "1")
    refuses(*train, "--exits", "3", words=("has 2 exits already",))
    outcome = offramp(*train, "--out", "two", *SETTINGS)
    assert outcome.code == 0, outcome.stderr
    outcome = offramp("calibrate", "two", "--network", "net.py:with_exits", "--thresholds", "0.9")
    assert (outcome.code, outcome.stderr) == (0, "")


def test_training_goes_on_with_the_same_settings_only(run, offramp, refuses):
    resumed = (*TRAIN, *SETTINGS, "--out", run, "--resume")
    assert "trained to the end already" in offramp(*resumed).stdout
    weights = run / "model.safetensors"
    trained = weights.read_bytes()
    weights.unlink()
    refuses("evaluate", run, *NETWORK, words=("train --network FILE.py:function", "--resume"))
    refuses(*resumed, "--seed", "1", words=("other settings",))
    outcome = offramp(*resumed)
    assert outcome.code == 0, outcome.stderr
    assert weights.read_bytes() == trained


def test_a_saved_run_takes_the_file_too(run, offramp, figures_of):
    recipe = run / "recipe.json"
    said = json.loads(recipe.read_text())
    assert said["own"]["fit"]["learning_rate"] == 0.01
    del said["own"]  # as offramp.save writes it
    recipe.write_text(json.dumps(said | {"data": None}))
    (run.parent / "net.py").write_text(
        NET.replace("def build(", "def backbone(").replace("build(10)", "backbone(10)")
        + """

def build(num_classes):
    import torch

    example = torch.zeros(2, 1, 8, 8)
    return offramp.add_exits(
        backbone(num_classes), at="auto", num_exits=3, num_classes=10, example=example
    )
"""
    )
    assert offramp("calibrate", run, *NETWORK, "--thresholds", "0.9,off").code == 0
    figures = figures_of("evaluate", run, *NETWORK, "--data", "pictures", "--subset", "50")
    assert figures["num_samples"] == 50


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train --network net.py --data pictures", ("FILE.py:function",)),
        ("train --network none.py:build --data pictures", ("none.py",)),
        ("train --network net.py:none --data pictures", ("function none", "net.py")),
        ("train --network net.py:build --data pictures", ("--exits 3",)),
        ("train --network net.py:broken --data pictures", ("KeyError", "no such layer")),
        ("train --network net.py:nothing --data pictures", ("NoneType",)),
        ("train --network bad.py:build --data pictures", ("bad.py", "NameError")),
        ("train --network bare.py:build --data pictures", ("bare.py", "preprocessing =")),
        ("train --network net.py:build", ("--data PATH",)),
        ("train digits-mlp --network net.py:build", ("a recipe or --network",)),
        ("train --exits 3", ("--set num_exits=N",)),
        ("train --network net.py:build --exits 3 --data none", ("none",)),
        (
            "train --network net.py:build --exits 3 --data pictures/test",
            ("split train", "It has test"),
        ),
        ("train --network net.py:build --exits 3 --data pictures --set lr=1", ("learning_rate",)),
        ("evaluate bundle --network net.py:build", ("is a bundle",)),
    ],
)
def test_wrong_input_is_refused(run, workplace, refuses, tiny_bundle, command, words):
    (workplace / "bad.py").write_text("nix\n")
    (workplace / "bare.py").write_text("def build():\n    return None\n")
    (workplace / "bundle").symlink_to(tiny_bundle)
    refuses(*command.split(), words=words)
