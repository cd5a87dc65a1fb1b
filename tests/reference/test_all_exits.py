"""Leaving early changes nothing: the runner against a loop that runs everything and chooses."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from all_exits import Chosen, choose_afterwards

import offramp
from offramp.data.sources import load_split
from offramp.recipes.exits import find_recipe
from offramp.runs.run import load_batches
from offramp.zoo.mlp import mlp

ROOT = Path(__file__).parents[2]
TUTORIAL_RUN = Path(os.environ.get("OFFRAMP_EMNIST_MLP_RUN", ROOT / "runs/emnist-mlp"))
TUTORIAL_THRESHOLDS_NATS = (0.1, 0.5)

NEAR = 1e-4
"""A sample whose confidence is this near its threshold may leave elsewhere."""

BATCH_SIZES = (1, 7, 256)


def assert_same_answers(network, policy, inputs, expected: Chosen, *, batch_size: int) -> None:
    """Compare exit and prediction of every sample; count and print those near a threshold."""
    runner = offramp.AdaptiveRunner(network, policy)
    results = [runner.run(batch) for batch in inputs.split(batch_size)]
    exits = torch.cat([result.exit_index for result in results])
    predictions = torch.cat([result.output.argmax(1) for result in results])
    differs = exits != torch.tensor(expected.exits)
    differs |= predictions != torch.tensor(expected.predictions)
    near = torch.tensor(expected.distances) < NEAR
    counts = f"{int(near.sum())} samples near a threshold, {int(differs.sum())} differ"
    print(f"batch {batch_size}: {counts}")
    assert not (differs & ~near).any()
    assert int((differs & near).sum()) <= len(inputs) / 1000


@pytest.fixture(scope="module")
def digits():
    pixels = load_split("digits", "train").store[torch.arange(1024)]
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def random_network(seed: int, inputs):
    """The digits network with random weights, and thresholds that let half go at each exit."""
    torch.manual_seed(seed)
    network = mlp(in_features=64, widths=(128, 256, 256), num_classes=10).eval()
    features, thresholds_nats = inputs, []
    for stage, head in zip(network.stages, network.exits, strict=True):
        features = stage(features)
        head.weight /= head(features).std() / 3
        entropy = torch.distributions.Categorical(logits=head(features)).entropy()
        thresholds_nats.append(float(entropy.quantile(0.5)))
    return network, thresholds_nats[:-1]


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_runner_equals_the_all_exits_loop_on_random_networks(digits, seed, batch_size):
    network, thresholds_nats = random_network(seed, digits)
    expected = choose_afterwards(network, digits, thresholds_nats)
    assert torch.tensor(expected.exits).bincount(minlength=3).min() > 50
    policy = offramp.ThresholdPolicy.from_entropy_nats(thresholds_nats, num_classes=10)
    assert_same_answers(network, policy, digits, expected, batch_size=batch_size)


@pytest.fixture(scope="module")
def tutorial():
    """The tutorial's network, its policy, all test images, and the loop's answers.

    Where there is no run of it, it is trained for an epoch on these very images: whether two ways
    of running it agree is all that is asked.
    """
    if "OFFRAMP_DATA" not in os.environ:
        pytest.skip("OFFRAMP_DATA is not set")
    recipe = find_recipe("emnist-mlp")
    batches, _, _ = load_batches(recipe, "test")
    if (TUTORIAL_RUN / "model.safetensors").is_file():
        network = offramp.load(TUTORIAL_RUN).network
    else:
        network = recipe.build_network()
        offramp.fit(network, batches, config=replace(recipe.fit, epochs=1, device="cpu"))
    inputs, _ = batches.__getitems__(range(len(batches)))
    policy = offramp.ThresholdPolicy.from_entropy_nats(TUTORIAL_THRESHOLDS_NATS, num_classes=47)
    expected = choose_afterwards(network, inputs, TUTORIAL_THRESHOLDS_NATS)
    return network, policy, inputs, expected


@pytest.mark.data
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_runner_equals_the_all_exits_loop_on_the_tutorials_network(tutorial, batch_size):
    network, policy, inputs, expected = tutorial
    assert len(inputs) == 18_800
    assert_same_answers(network, policy, inputs, expected, batch_size=batch_size)
