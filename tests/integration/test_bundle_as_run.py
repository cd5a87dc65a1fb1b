"""Commands that need no weights take a bundle where they take a run."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from offramp.recipes.recipe import Recipe
from offramp.runtime import Session, read_bundle


@pytest.fixture
def bundle(exported_run):
    """A run that spreads the samples over the exits, in ``run``, and its bundle."""
    return exported_run / "bundle"


@pytest.fixture
def bundle_with_an_exit_off(workplace, export_digits):
    return shutil.copytree(export_digits("off,0.6"), workplace / "run") / "bundle"


@pytest.fixture
def pictures(workplace):
    """The first twenty digits, as files."""
    paths = []
    for number, pixels in enumerate(load_digits().images[:20]):
        paths.append(workplace / f"{number}.png")
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(paths[-1])
    return paths


def test_evaluate_says_the_same_of_run_and_bundle(bundle, figures_of):
    of_run, of_bundle = figures_of("evaluate", "run"), figures_of("evaluate", bundle)
    assert all(row["share"] > 0.02 for row in of_run["exits"])
    assert of_bundle == of_run


def test_evaluate_prints_the_same_table_of_run_and_bundle(bundle, offramp):
    of_run, of_bundle = offramp("evaluate", "run"), offramp("evaluate", bundle)
    assert (of_bundle.code, of_bundle.stderr) == (0, "")
    assert of_bundle.stdout == of_run.stdout


def test_exit_that_is_off_has_no_row_and_the_others_keep_their_numbers(
    bundle_with_an_exit_off, figures_of
):
    of_run, of_bundle = figures_of("evaluate", "run"), figures_of("evaluate", "run/bundle")
    assert [row["index"] for row in of_bundle["exits"]] == [1, 2]
    assert of_run["exits"][0]["share"] == 0
    assert of_bundle.pop("exits") == of_run.pop("exits")[1:]
    assert of_bundle == of_run
    assert of_bundle["plain_macs"] == read_bundle("run/bundle").plain_macs


@pytest.mark.parametrize("split", ["calibration", "train"])
def test_figures_on_data_that_may_have_been_seen_are_refused_unless_asked_for(
    bundle, figures_of, refuses, split
):
    words = ("--in-sample", "--split test", split)
    refuses("evaluate", bundle, "--split", split, words=words)
    assert figures_of("evaluate", bundle, "--split", split, "--in-sample")["in_sample"] is True


def test_plain_network_stands_beside_a_bundle(bundle, train_command, offramp, figures_of):
    plain = [*train_command, "--epochs", 1, "--set", "variant=plain", "--out", "plain"]
    assert offramp(*plain).code == 0
    assert offramp("export", "plain").code == 0
    beside_run = figures_of("evaluate", bundle, "--plain", "plain")["plain_accuracy"]
    assert beside_run == figures_of("evaluate", "plain")["accuracy"]
    beside_bundle = figures_of("evaluate", bundle, "--plain", "plain/bundle")["plain_accuracy"]
    assert beside_bundle == beside_run


def test_predict_prints_the_same_lines_for_run_and_bundle(bundle, offramp, pictures):
    of_run, of_bundle = offramp("predict", "run", *pictures), offramp("predict", bundle, *pictures)
    assert (of_bundle.code, of_bundle.stderr) == (0, "")
    assert {line.split("exit ")[1][0] for line in of_run.stdout.splitlines()} > {"0"}
    assert of_bundle.stdout == of_run.stdout


def test_predict_keeps_the_numbers_of_exits(bundle_with_an_exit_off, offramp, pictures):
    of_run = offramp("predict", "run", *pictures)
    of_bundle = offramp("predict", "run/bundle", *pictures)
    assert {line.split("exit ")[1][0] for line in of_run.stdout.splitlines()} <= {"1", "2"}
    assert of_bundle.stdout == of_run.stdout


def test_a_bundle_is_answered_without_its_network(bundle, figures_of, offramp, pictures):
    def build(_):
        raise AssertionError("a bundle needs no network of torch's")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "build_network", build)
        assert offramp("predict", bundle, *pictures).code == 0
        assert figures_of("evaluate", bundle)["num_samples"] == 450
        figures_of("time", bundle, "--batch-size", "64")


def test_a_bundle_is_timed_alone(bundle, figures_of):
    timing = figures_of("time", bundle, "--batch-size", "1,64")
    assert set(timing["versions"]) == {"python", "onnxruntime"}
    found = [(row["backend"], row["batch_size"]) for row in timing["results"]]
    assert found == [("onnxruntime", 1), ("onnxruntime", 64)]
    for row in timing["results"]:
        assert len(row["stage_ms"]) == 3
        assert min(row["plain_ms"], row["all_exits_ms"], row["never_exit_ms"]) > 0
        assert row["speedup"] == pytest.approx(row["plain_ms"] / row["adaptive_ms"])
    evaluated = figures_of("evaluate", bundle)
    assert timing["shares"] == pytest.approx([row["share"] for row in evaluated["exits"]])
    assert timing["mean_macs"] == pytest.approx(evaluated["mean_macs"])


def test_a_bundle_with_an_exit_off_is_timed_alone(bundle_with_an_exit_off, figures_of):
    timing = figures_of("time", "run/bundle", "--backend", "onnxruntime", "--batch-size", "64")
    assert timing["shares"][0] == 0
    assert len(timing["shares"]) == 3
    assert len(timing["results"][0]["stage_ms"]) == 2


@pytest.mark.parametrize("command", ["evaluate", "time"])
def test_bundle_of_a_network_of_ones_own_names_no_data(bundle, refuses, edit_json, command):
    edit_json(bundle / "bundle.json", recipe=None)
    refuses(command, bundle, words=("run/bundle", "network of your own", "--data PATH"))


def test_bundle_says_itself_how_pictures_are_prepared(bundle, offramp, edit_json, pictures):
    before = offramp("predict", bundle, *pictures)
    edit_json(bundle / "bundle.json", recipe=None)
    assert offramp("predict", bundle, *pictures) == before


def test_older_bundle_takes_pictures_as_its_recipe_does(bundle, offramp, edit_json, pictures):
    before = offramp("predict", bundle, *pictures)
    edit_json(bundle / "bundle.json", pictures=None, schema_version=2)
    assert offramp("predict", bundle, *pictures) == before


@pytest.mark.parametrize("folder", ["run", "run/bundle"])
def test_a_recipe_takes_pictures_in_folders_too(bundle, folder, figures_of, workplace, pictures):
    for label in ("3", "8"):
        (workplace / "mine" / label).mkdir(parents=True)
        shutil.copy(pictures[0], workplace / "mine" / label / "a.png")
    figures = figures_of("evaluate", folder, "--data", "mine")
    assert (figures["recipe"], figures["split"]) == ("digits-mlp", "mine")
    assert (figures["num_samples"], figures["accuracy"]) in ((2, 0.5), (2, 0.0))


def test_what_a_bundle_does_not_say_is_said(bundle, offramp, edit_json, pictures):
    edit_json(bundle / "bundle.json", pictures=None, recipe=None)
    outcome = offramp("predict", bundle, *pictures)
    assert (outcome.code, outcome.stdout.count("\n")) == (0, len(pictures))
    assert "does not say how pictures become its inputs" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": ["digits-mlp"]}, ("bundle.json is damaged", "recipe")),
        ({"recipe__data": "nowhere"}, ("bundle.json is damaged", "'nowhere'")),
        ({"recipe__data": "cifar10"}, ("--data",)),
        ({"steps": []}, ("bundle.json is damaged",)),
        ({"schema_version": 99}, ("99",)),
    ],
)
def test_damaged_bundle_is_refused(bundle, refuses, edit_json, changes, words):
    edit_json(bundle / "bundle.json", **changes)
    refuses("evaluate", bundle, words=words)


def test_pictures_of_another_shape_than_the_bundles_are_refused(
    bundle, refuses, edit_json, pictures
):
    edit_json(bundle / "bundle.json", recipe__data="cifar10", pictures=None)
    refuses("predict", bundle, *pictures, words=("(B, 1, 8, 8)", "(20, 3, 32, 32)"))


@pytest.mark.parametrize("command", ["evaluate", "time"])
def test_incomplete_bundle_is_refused(bundle, refuses, command):
    (bundle / read_bundle(bundle).steps[1].file).unlink()
    refuses(command, bundle, words=("run/bundle/step_1.onnx", "missing"))


def test_bundle_without_its_plain_network_is_not_timed(bundle, refuses, edit_json):
    edit_json(bundle / "bundle.json", plain_file=None, plain_sha256=None)
    refuses("time", bundle, words=("run/bundle", "no plain network", "--plain"))


@pytest.mark.parametrize("field", ["output", "exit_index"])
def test_bundle_that_answers_otherwise_than_its_steps_is_not_timed(
    bundle, refuses, monkeypatch, field
):
    answer = Session.run

    def run(session, *inputs):
        result = answer(session, *inputs)
        return replace(result, **{field: (getattr(result, field) + 1).clip(max=2)})

    monkeypatch.setattr(Session, "run", run)
    refuses("time", bundle, words=("Nothing was timed",))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("time run/bundle --backend torch", ("onnxruntime", "run/bundle", "'torch'")),
        ("time run/bundle --backend torch,onnxruntime", ("onnxruntime", "run/bundle")),
        ("time run/bundle --backend tpu", ("torch, onnxruntime", "'tpu'")),
        ("time run/bundle --bundle run/bundle", ("--bundle", "a bundle already")),
        ("time run/bundle --batch-size 9999", ("[1, 450]", "9999")),
        ("time run/bundle --device tpu", ("cpu", "'tpu'")),
        ("evaluate run/bundle --split tset", ("train, test", "'tset'")),
        ("evaluate run/bundle --plain run/bundle", ("--plain", "one exit", "3")),
        ("predict run/bundle nowhere.png", ("nowhere.png",)),
    ],
)
def test_wrong_input_is_refused(bundle, refuses, command, words):
    refuses(*command.split(), words=words)
