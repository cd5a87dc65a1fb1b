"""``offramp place``: a proposal from a recipe or a run, and wrong input."""

import ast
import json
import shlex
from dataclasses import replace

import pytest
import torch
from torch import nn

import offramp.evaluation.placement as placement_module
from offramp import add_exits, load
from offramp.recipes.exits import find_recipe

RECIPE = "digits-mlp"


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Every piece and head takes a millisecond: what is proposed must not hang on the machine."""
    monkeypatch.setattr(placement_module, "_timed", lambda module, given: (module(*given), 1.0))


def plain_backbone():
    network = replace(find_recipe(RECIPE), variant="plain").build_network()
    return nn.Sequential(*network.stages, network.exits[-1])


def test_table_says_where_on_what_and_how_to_go_on(workplace, offramp):
    outcome = offramp("place", RECIPE, "--num-exits", 2, "--batch-size", 64)
    assert (outcome.code, outcome.stderr) == (0, "")
    rows = outcome.stdout.splitlines()
    assert any("Linear" in row for row in rows)
    (chosen,) = (row for row in rows if row.endswith("exit 0"))
    *_, hardware, _, use = outcome.stdout.splitlines()
    assert f"torch {torch.__version__}" in hardware
    assert f"{torch.get_num_threads()} threads" in hardware
    at = ast.literal_eval(use.partition("at=")[2].partition("]")[0] + "]")
    assert chosen.split()[0] == at[0]
    images = torch.randn(2, 1, 8, 8)
    network = add_exits(plain_backbone(), at=at, num_classes=10, example=images)
    assert network.num_exits == 2


def test_json_carries_what_a_number_must_carry(workplace, offramp):
    threads = torch.get_num_threads()
    outcome = offramp("place", RECIPE, "--num-exits", 2, "--threads", threads, "--json", "-")
    content = json.loads(outcome.stdout)
    assert (content["backbone"], content["batch_size"]) == (RECIPE, 1)
    assert content["hardware"]
    assert content["threads"] == threads
    assert content["versions"]["torch"] == torch.__version__
    assert content["at"] == [row["path"] for row in content["candidates"] if row["chosen"]]
    assert len(content["at"]) == 1
    offramp("place", RECIPE, "--num-exits", 2, "--json", "figures.json")
    assert json.loads((workplace / "figures.json").read_text()).keys() == content.keys()


def test_a_run_is_cut_with_its_own_weights(run, offramp):
    outcome = offramp("place", run, "--num-exits", 2, "--batch-size", 64, "--json", "-")
    network = load(run).network
    backbone = nn.Sequential(*network.stages, network.exits[-1])
    images = torch.randn(2, 1, 8, 8)
    at = json.loads(outcome.stdout)["at"]
    again = add_exits(backbone, at=at, num_classes=10, example=images).eval()
    assert torch.equal(again(images)[-1], network(images)[-1])


REFUSED = {
    "unknown recipe": ("digits-mpl --num-exits 2", ("'digits-mpl'", "mean 'digits-mlp'")),
    "no run": (". --num-exits 2", ("recipe.json", "offramp train")),
    "one exit": ("digits-mlp --num-exits 1", ("num_exits", "at least 2", "1")),
    "too many exits": ("digits-mlp --num-exits 99", ("num_exits", "at most", "99")),
    "exits not told": ("digits-mlp", ("--num-exits", "place --help")),
    "exits in words": ("digits-mlp --num-exits two", ("--num-exits", "integer")),
    "empty batch": ("digits-mlp --num-exits 2 --batch-size 0", ("--batch-size", "[1, 4096]", "0")),
    "huge batch": ("digits-mlp --num-exits 2 --batch-size 9999", ("--batch-size", "9999")),
    "no threads": ("digits-mlp --num-exits 2 --threads 0", ("--threads", "at least 1", "0")),
    "unwritable JSON": ("digits-mlp --num-exits 2 --json nowhere/figures", ("nowhere",)),
}


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_wrong_input_is_refused(workplace, refuses, arguments, words):
    refuses("place", *shlex.split(arguments), words=words)
