"""A run sent to the hub and fetched from it on the command line; a recorder is the hub."""

import json

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

import offramp as off
from offramp.zoo.mlp import mlp


def test_push_measures_first_and_pull_brings_the_same_run_back(calibrated_run, offramp, pushed):
    figures = json.loads(offramp("evaluate", calibrated_run, "--json", "-").stdout)
    outcome = offramp("push", calibrated_run, "user/digits", "--private")
    assert (outcome.code, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    assert "digits-mlp, test, 450 samples" in lines[0]
    assert lines[-1] == f"pushed {calibrated_run}: https://hub/user/digits"
    card = ModelCard.load(pushed / "README.md")
    assert card.data.eval_results[0].metric_value == figures["accuracy"]
    assert f"{figures['mean_macs']:,.0f} on average" in card.text
    pulled = offramp("pull", "user/digits")
    assert (pulled.code, pulled.stderr) == (0, "")
    assert pulled.stdout == "pulled user/digits: runs/digits\n"
    again = json.loads(offramp("evaluate", "runs/digits", "--json", "-").stdout)
    assert again == figures


def test_without_evaluation_the_card_has_no_figures(run, offramp, pushed):
    assert offramp("push", run, "user/digits", "--no-evaluate").code == 0
    assert "Nothing was measured" in (pushed / "README.md").read_text()
    assert not (pushed / "policy.json").exists()


def test_a_plain_network_stands_beside_in_the_card(calibrated_run, offramp, pushed):
    options = ("--epochs", 1, "--set", "widths=8,8", "--set", "variant=plain", "--out", "plain")
    assert offramp("train", *options).code == 0
    assert offramp("push", calibrated_run, "user/digits", "--plain", "plain").code == 0
    assert "A plain network trained as long" in (pushed / "README.md").read_text()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("push run user/digits", ("policy", "offramp calibrate")),
        ("push nowhere user/digits", ("nowhere", "recipe.json")),
        ("push own user/digits", ("--no-evaluate", "push_to_hub")),
        ("pull user/digits --out full", ("full", "exists already")),
        ("push run", ("REPO", "push --help")),
    ],
)
def test_wrong_input_is_refused(run, workplace, pushed, refuses, command, words):
    off.save("own", mlp(in_features=6, widths=(5, 8), num_classes=4))
    (workplace / "full").mkdir()
    (workplace / "full" / "letter.txt").write_text("dear reader")
    refuses(*command.split(), words=words)
    assert not pushed.exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("push run user/digits --no-evaluate", ("user/digits", "HF_HUB_OFFLINE")),
        ("pull user/digits", ("user/digits", "HF_HUB_OFFLINE")),
        ("pull a/b/c", ("'a/b/c'", "neither")),
    ],
)
def test_without_a_network_it_is_one_line(
    calibrated_run, workplace, monkeypatch, tmp_path_factory, refuses, command, words
):
    cache = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuses(*command.split(), words=words)
