"""Bundles of networks that skip blocks: torch is what they are held to."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import offramp.exporting.bundle as export_module
from offramp.errors import ExportMismatchError, InvalidArgumentError
from offramp.exporting.bundle import export
from offramp.exporting.graph import write_single
from offramp.exporting.quantize import quantize
from offramp.families.agreement import answer_in_batches
from offramp.families.skip import SkipRunner, gated_sum
from offramp.measure.agreement import compare
from offramp.policy.policies import never_leave
from offramp.policy.routing_policy import GatePolicy
from offramp.routing.gates import Gates
from offramp.routing.skip import SkipNetwork, add_gates
from offramp.runtime import Session, read_bundle, with_routing_threshold
from offramp.runtime.files import file_sha256
from offramp.zoo.resnet import resnet

IMAGES = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def small_network(gates):
    """Three gates; the second block changes the shape."""
    torch.manual_seed(0)
    backbone = resnet(in_channels=3, widths=(8, 16), blocks=(2, 2), exits_after=(), num_classes=5)
    network = add_gates(backbone, gates=gates).eval()
    for parameter in network.gates.parameters():  # gates that tell these images apart
        nn.init.normal_(parameter, std=1.0 if gates == "recurrent" else 0.2)
    for module in network.modules():  # away from the identity that a new one is
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


@torch.no_grad()
def middle_threshold(network):
    return float(network(IMAGES).probability.median())


@pytest.fixture(scope="module", params=["recurrent", "feed_forward"])
def exported(request, tmp_path_factory):
    """A network, and the bundle that was written of it at a threshold in the middle."""
    network = small_network(request.param)
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    names = tuple("abcde")
    bundle = export(
        network, GatePolicy(middle_threshold(network)), folder, IMAGES, class_names=names
    )
    return network, bundle


def step_by_step(bundle):
    """Without the file for single samples."""
    return replace(bundle, single_file=None, single_sha256=None)


@pytest.mark.parametrize("where", ["all run", "some run", "none run"])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_session_answers_as_the_runner_and_the_gated_sum(exported, where, batch_size):
    network, bundle = exported
    threshold = {"all run": 0.0, "none run": 1.0}.get(where, bundle.skip.threshold)
    policy = GatePolicy(threshold)
    session = Session(with_routing_threshold(bundle, threshold), threads=1)
    found = answer_in_batches(session, IMAGES, batch_size=batch_size)
    agreement = compare(found, gated_sum(network, threshold, (IMAGES,)))
    assert agreement.holds
    assert max(agreement.differences) < 1e-4
    expected = SkipRunner(network, policy).run(IMAGES)
    alike = (found.blocks == expected.blocks).all(1)
    assert alike.sum() >= len(IMAGES) - agreement.moved - 1
    for name in ("output", "confidence", "macs", "exit_index"):
        theirs, ours = getattr(found, name)[alike], getattr(expected, name)[alike]
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    share = found.blocks.double().mean()
    assert share == {"all run": 1, "none run": 0}.get(where, share)
    assert where != "some run" or 0.2 < share < 0.8


def test_one_graph_and_the_steps_say_the_same_of_single_samples(exported):
    _, bundle = exported
    in_one, in_steps = (
        answer_in_batches(Session(way, threads=1), IMAGES, batch_size=1)
        for way in (bundle, step_by_step(bundle))
    )
    assert torch.equal(in_one.blocks, in_steps.blocks)
    torch.testing.assert_close(in_one.output, in_steps.output, rtol=1e-5, atol=1e-5)


def test_nan_runs_every_block(exported):
    _, bundle = exported
    images = IMAGES.clone()
    images[3] = float("nan")
    session = Session(with_routing_threshold(bundle, 1.0))
    assert session.run(images).blocks[3].all()
    assert session.run(images[3:4]).blocks.all()


def test_description_is_complete(exported):
    network, bundle = exported
    assert read_bundle(bundle.folder) == bundle
    costs = network.costs(IMAGES)
    assert bundle.plain_macs == costs.plain_macs
    assert bundle.skip.fixed_macs == costs.fixed_macs
    assert tuple(step.gate_macs for step in bundle.skip.steps) == costs.gate_macs
    assert tuple(step.block_macs for step in bundle.skip.steps) == costs.block_macs
    assert [step.around is not None for step in bundle.skip.steps] == [False, True, False]
    assert bundle.policy == {"kind": "gates", "threshold": bundle.skip.threshold}
    assert bundle.class_names == tuple("abcde")
    assert {path.name for path in bundle.folder.iterdir()} == {
        "bundle.json",
        *(file.name for file in bundle.files),
    }


def test_a_block_is_in_its_own_file_and_behind_an_if(exported):
    """So that neither way to run single samples can compute it unasked."""
    network, bundle = exported
    single = onnx.load(bundle.folder / "single.onnx").graph
    outside = [node.op_type for node in single.node]
    assert outside.count("If") == network.num_gates
    gates = [onnx.load(bundle.folder / step.gate.name) for step in bundle.skip.steps]
    stem = onnx.load(bundle.folder / bundle.skip.stem.name)
    always = sum(node.op_type == "Conv" for model in (stem, *gates) for node in model.graph.node)
    assert outside.count("Conv") == always
    for step in bundle.skip.steps:
        block = [node.op_type for node in onnx.load(bundle.folder / step.block.name).graph.node]
        assert block.count("Conv") == (2 if step.around is None else 3)


def test_int8_is_refused(exported, tmp_path):
    _, bundle = exported
    with pytest.raises(InvalidArgumentError, match=r"int8 .* family skip: run it in float32"):
        quantize(bundle, tmp_path / "int8", IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_policy_of_another_kind_is_refused(tmp_path, network):
    with pytest.raises(InvalidArgumentError, match="Got MultiExitNetwork and GatePolicy"):
        export(network, GatePolicy(), tmp_path / "bundle", torch.randn(4, 6))
    with pytest.raises(InvalidArgumentError, match="Got SkipNetwork and ThresholdPolicy"):
        export(small_network("recurrent"), never_leave(1), tmp_path / "bundle", IMAGES)
    assert list(tmp_path.iterdir()) == []


class LinearBlock(nn.Module):
    """A residual block of the simplest kind, for tests that need many exports."""

    shortcut = None

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x).relu()


class CountingGates(Gates):
    """Goes by the mean, and hands on what it was handed and how often a gate was asked."""

    def forward(self, index, x, state):
        asked = torch.zeros_like(x[:, 0]) if index == 0 else state[1]
        first = x.mean(1) if index == 0 else state[0]
        return first + 0.1 * asked - 0.1, (first, asked + 1)


@pytest.fixture
def linear_network():
    blocks = [LinearBlock(), LinearBlock()]
    return SkipNetwork(nn.Identity(), blocks, CountingGates(), nn.Linear(8, 3)).eval()


def test_state_that_gates_hand_on_unchanged_and_a_stem_that_does_nothing(tmp_path, linear_network):
    x = torch.randn(200, 8)
    bundle = export(linear_network, GatePolicy(), tmp_path / "bundle", x, plain=False)
    assert bundle.plain_file is None
    before = x.clone()
    found = Session(bundle).run(x)
    assert torch.equal(x, before)
    expected = SkipRunner(linear_network).run(x.clone())  # it writes on what the stem hands on
    np.testing.assert_array_equal(found.blocks, expected.blocks)
    assert 0.2 < found.blocks.mean() < 0.8
    np.testing.assert_allclose(found.output, expected.output, atol=1e-5)


class SureGates(CountingGates):
    """Whose probabilities round to 1 where a block runs, so that even a threshold of 1 runs it."""

    def forward(self, index, x, state):
        score, state = super().forward(index, x, state)
        return 40 * score + 17, state


def test_gates_that_are_as_good_as_sure_can_be_exported(tmp_path, linear_network):
    linear_network.gates = SureGates()
    bundle = export(linear_network, GatePolicy(0.9), tmp_path / "bundle", torch.randn(200, 8))
    assert bundle.skip.threshold == 0.9


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_branches_that_no_sample_takes_are_checked_too(
    tmp_path, linear_network, monkeypatch, threshold
):
    """All samples go one way; in the file for single samples, a wrong weight waits on the other."""

    def write_and_spoil(bundle, *arguments):
        written = write_single(bundle, *arguments)
        path = bundle.folder / written.single_file
        model = onnx.load(path)
        *_, last = (node for node in model.graph.node if node.op_type == "If")
        branches = {attribute.name: attribute.g for attribute in last.attribute}
        if threshold == 0.0:
            branches["then_branch"].node[0].op_type = "Neg"
        else:
            matrix = next(w for w in branches["else_branch"].initializer if len(w.dims) == 2)
            values = -onnx.numpy_helper.to_array(matrix)
            matrix.CopyFrom(onnx.numpy_helper.from_array(values, matrix.name))
        onnx.save(model, path)
        return replace(written, single_sha256=file_sha256(path))

    monkeypatch.setattr(export_module, "write_single", write_and_spoil)
    with pytest.raises(ExportMismatchError, match="logits differ"):
        export(linear_network, GatePolicy(threshold), tmp_path / "bundle", torch.randn(50, 8))
    assert list(tmp_path.iterdir()) == []


def test_networks_in_double_precision_are_exported(tmp_path, linear_network):
    x = torch.randn(50, 8, dtype=torch.float64)
    bundle = export(linear_network.double(), GatePolicy(0.6), tmp_path / "bundle", x)
    expected = SkipRunner(linear_network, GatePolicy(0.6)).run(x.clone())
    for found in (Session(bundle).run(x), answer_in_batches(Session(bundle), x, batch_size=1)):
        np.testing.assert_allclose(found.output, expected.output, atol=1e-12)
