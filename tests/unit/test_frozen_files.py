"""Bundles, policies and recipes as every earlier version wrote them are read for ever.

The files in ``tests/frozen`` are never changed: recipes and policies of networks that were ever
committed, and descriptions of bundles of each version and family, without their ONNX files.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from offramp.policy.as_dict import policy_to_dict
from offramp.recipes.recipe import Recipe
from offramp.runs.run import read_policy, read_recipe
from offramp.runtime import read_bundle
from offramp.runtime.bundle import NOBODY_LEAVES, write_bundle

FROZEN = Path(__file__).parents[1] / "frozen"


def names(folder):
    return sorted(path.stem for path in (FROZEN / folder).iterdir())


def onnx_names(content):
    """Names of all ONNX files in a description."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [name for value in content for name in onnx_names(value)]
    return [content] if isinstance(content, str) and content.endswith(".onnx") else []


@pytest.fixture
def frozen_bundle(tmp_path):
    def read(name):
        text = (FROZEN / "bundles" / f"{name}.json").read_text()
        for file in onnx_names(json.loads(text)):
            (tmp_path / file).write_bytes(b"frozen")
        (tmp_path / "tokenizer.json").write_text('{"model": {}}')
        (tmp_path / "bundle.json").write_text(text)
        return read_bundle(tmp_path)

    return read


def test_there_is_a_frozen_file_of_each_family_and_schema():
    assert {
        "exits-1",
        "exits-2",
        "exits-3",
        "exits-4",
        "skip-2",
        "halting-2",
        "dense-2",
        "text-2",
        "text-3",
    } <= set(names("bundles"))
    kinds = {json.loads(p.read_text())["policy"]["kind"] for p in (FROZEN / "policies").iterdir()}
    assert len(kinds) == 7


@pytest.mark.parametrize("name", names("bundles"))
def test_bundle_is_read_and_comes_back(name, frozen_bundle):
    bundle = frozen_bundle(name)
    assert bundle.num_steps >= 2
    assert bundle.family == (
        name.split("-")[0] if name.startswith(("skip", "halting")) else "exits"
    )
    write_bundle(bundle)
    assert read_bundle(bundle.folder) == bundle


@pytest.mark.parametrize(
    ("name", "thresholds"),
    [
        ("exits-1", [NOBODY_LEAVES, 0.0]),
        ("exits-2-first", [NOBODY_LEAVES, 0.25, 0.0]),
        ("exits-2", [NOBODY_LEAVES, 0.0]),
        ("patience-1", [2.0, 2.0, 2.0]),
    ],
)
def test_where_nobody_leaves_is_written_as_today(name, thresholds, frozen_bundle):
    assert [step.threshold for step in frozen_bundle(name).steps] == thresholds


@pytest.mark.parametrize("name", names("policies"))
def test_policy_is_read_and_comes_back(name):
    policy, content = read_policy(FROZEN / "policies" / f"{name}.json")
    described = policy_to_dict(policy)
    assert described["kind"] == name.split("-")[0]
    assert described.items() >= content["policy"].items()


def test_bundles_say_how_samples_are_prepared_from_3_on(frozen_bundle):
    assert frozen_bundle("exits-2").preprocessing is None
    pictures = frozen_bundle("exits-3")
    assert pictures.preprocessing.mean == (0.1, 0.2, 0.3)
    assert pictures.calibration.data.num_samples == 500
    assert frozen_bundle("text-3").preprocessing.max_tokens == 128


def test_bundles_hold_the_front_and_know_their_samples_from_4_on(frozen_bundle):
    before = frozen_bundle("exits-3").calibration
    assert (before.front, before.data.hashes) == (None, None)
    said = frozen_bundle("exits-4").calibration
    assert (said.front.passed, [point.risk for point in said.front.points]) == (2, [0, 0.01, 0.05])
    assert said.data.count_among(np.array([70, 71, 2**63], dtype=np.uint64)) == 2


def test_exits_that_are_off_stay_off():
    policy, _ = read_policy(FROZEN / "policies" / "patience-2.json")
    assert policy.thresholds == (0.5, math.inf, 0.5)
    older, _ = read_policy(FROZEN / "policies" / "patience-1.json")
    assert older.thresholds == (0.0, 0.0)


@pytest.mark.parametrize("name", names("recipes"))
def test_recipe_is_read_and_comes_back(name, tmp_path):
    text = (FROZEN / "recipes" / f"{name}.json").read_text()
    (tmp_path / "recipe.json").write_text(text)
    recipe, class_names, data = read_recipe(tmp_path)
    content = json.loads(text)["recipe"]
    assert recipe.fit.epochs == content["fit"]["epochs"]
    assert json.loads(json.dumps(recipe.network_options)) == content["network_options"]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert (len(class_names), data) == (2, None)
