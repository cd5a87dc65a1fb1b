from dataclasses import replace

import pytest
import torch

import offramp
from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.model.checkpoint import save_weights
from offramp.recipes.exits import find_recipe
from offramp.runs.run import create_folder, load_batches, write_recipe


@pytest.fixture
def run(tmp_path):
    """A run of the digits recipe, as if trained."""
    recipe = find_recipe("digits-mlp")
    options = {"in_features": 64, "widths": (16, 8), "num_classes": 10}
    recipe = replace(recipe, network_options=options, calibration_share=0.2)
    folder = create_folder(tmp_path / "run")
    write_recipe(folder, recipe=recipe, class_names=tuple("0123456789"), data=None)
    save_weights(recipe.build_network(), folder / "model.safetensors")
    return offramp.load(folder)


@pytest.mark.parametrize(("split", "meant"), [(None, "test"), ("calibration", "calibration")])
def test_batches_are_those_of_the_recipe(run, split, meant):
    loader = offramp.load_data(run, split)
    inputs, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    expected, _, _ = load_batches(run.recipe, meant)
    expected_inputs, expected_labels = expected.__getitems__(range(len(expected)))
    assert torch.equal(inputs, expected_inputs)
    assert torch.equal(labels, expected_labels)


def test_evaluate_takes_them(run):
    test = offramp.load_data(run)
    runner = offramp.AdaptiveRunner(run.network, offramp.never_leave(2))
    report = offramp.evaluate(runner, test, offramp.collect(run.network, test))
    assert report.num_samples == 450  # a quarter of scikit-learn's 1,797 digits
    assert [row.share for row in report.exits] == [0, 1]


def test_what_cannot_be_loaded_is_refused(run):
    with pytest.raises(InvalidArgumentError, match="has the splits train, test"):
        offramp.load_data(run, "val")
    with pytest.raises(ArtifactError, match="network of your own"):
        offramp.load_data(replace(run, recipe=None))
