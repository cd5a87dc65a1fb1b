"""Skipping against the gated sum, which computes every block and masks."""

import pytest
import torch
from torch import nn

from offramp.errors import InvalidArgumentError
from offramp.families.skip import SkipRunner
from offramp.policy.routing_policy import GatePolicy
from offramp.routing.skip import add_gates, at_threshold
from offramp.zoo.resnet import resnet

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["recurrent", "feed_forward"])
def network(request):
    torch.manual_seed(0)
    backbone = resnet(in_channels=3, widths=(8, 16), blocks=(3, 3), exits_after=(), num_classes=5)
    network = add_gates(backbone, gates=request.param).eval()
    for parameter in network.gates.parameters():  # gates that tell these images apart
        nn.init.normal_(parameter, std=1.0 if request.param == "recurrent" else 0.2)
    return network


def middle_threshold(network):
    with torch.no_grad():
        return float(network(IMAGES).probability.median())


@pytest.mark.parametrize("batch_size", [1, 5, 24])
@pytest.mark.parametrize("where", ["all run", "some run", "none run"])
def test_skipping_equals_the_gated_sum(network, batch_size, where):
    threshold = {"all run": 0.0, "some run": middle_threshold(network), "none run": 1.0}[where]
    with torch.no_grad():
        expected = network(IMAGES, at_threshold(threshold))
    runner = SkipRunner(network, GatePolicy(threshold))
    before = IMAGES.clone()
    results = [runner.run(batch) for batch in IMAGES.split(batch_size)]
    output, blocks = (
        torch.cat([getattr(r, name) for r in results]) for name in ("output", "blocks")
    )
    assert torch.equal(IMAGES, before)
    share = blocks.double().mean()
    assert share == {"all run": 1, "none run": 0}.get(where, share)
    assert where != "some run" or 0.2 < share < 0.8
    # Rule 7: a gate within 1e-4 of the threshold may fall either way.
    near = ((expected.probability - threshold).abs() < 1e-4).any(1)
    assert torch.equal(blocks[~near], expected.action[~near].bool())
    torch.testing.assert_close(output[~near], expected.logits[~near], rtol=1e-4, atol=1e-4)
    assert near.sum() <= 1 or where == "some run"


def test_what_is_skipped_is_not_computed(network):
    ran = []
    for index, block in enumerate(network.blocks):
        block.body.register_forward_hook(
            lambda module, inputs, output, index=index: ran.append((index, len(output)))
        )
    runner = SkipRunner(network, GatePolicy(middle_threshold(network)))
    result = runner.run(IMAGES)
    counted = dict.fromkeys(range(network.num_gates), 0)
    ran.clear()
    result = runner.run(IMAGES)
    for index, size in ran:
        counted[index] += size
    assert list(counted.values()) == result.blocks.sum(0).tolist()
    costs = network.costs(IMAGES)
    assert torch.equal(result.macs, costs.macs(result.blocks))
    assert result.macs.double().mean() < costs.plain_macs


def test_every_sample_leaves_by_the_only_exit(network):
    result = SkipRunner(network).run(IMAGES)
    assert result.exit_index.tolist() == [0] * len(IMAGES)
    torch.testing.assert_close(result.confidence, result.output.softmax(-1).amax(-1))


def test_nan_runs_every_block(network):
    images = IMAGES.clone()
    images[3] = float("nan")
    result = SkipRunner(network, GatePolicy(1.0)).run(images)
    assert result.blocks[3].all()


def test_a_stem_that_does_nothing_leaves_the_callers_input_alone(network):
    maps = network.stem(IMAGES).detach()
    before = maps.clone()
    network.stem = nn.Sequential(nn.Identity())
    result = SkipRunner(network, GatePolicy(0.999)).run(maps)
    assert torch.equal(maps, before)
    with torch.no_grad():
        expected = network(maps, at_threshold(0.999))
    torch.testing.assert_close(result.output, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_must_be_a_probability(threshold):
    with pytest.raises(InvalidArgumentError, match=r"\[0, 1\]"):
        GatePolicy(threshold)
