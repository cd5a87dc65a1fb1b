"""Bundles of networks whose tokens halt: torch is what they are held to."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from offramp.errors import (
    ArtifactError,
    InvalidArgumentError,
    ShapeError,
)
from offramp.evaluation.processes import _all_steps
from offramp.exporting.bundle import export
from offramp.exporting.quantize import quantize
from offramp.families.agreement import answer_in_batches
from offramp.families.halting import HaltingRunner, masked_pass
from offramp.measure.agreement import compare
from offramp.model.ragged import Ragged
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy
from offramp.routing.halting import HaltingNetwork
from offramp.routing.token_parts import MaskedEmbed
from offramp.runtime import (
    PlainSession,
    Session,
    read_bundle,
    with_routing_threshold,
    with_thresholds,
)
from offramp.zoo.vit import PreNormLayer, vit

IMAGES = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))
LENGTHS = [3, 7, 1, 12, 5, 5, 9, 2, 4, 11, 6, 6]


def small_vit(depth=3, gate_scale=0.2, gate_center=1.6):
    """Some layers, nine patches and five classes."""
    torch.manual_seed(0)
    network = vit(
        in_channels=3,
        side=12,
        patch=4,
        width=16,
        depth=depth,
        num_heads=2,
        num_classes=5,
        gate_scale=gate_scale,
        gate_center=gate_center,
    )
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.4)
    return network.eval()


class WordEmbedding(nn.Module):
    """Embeddings as BERT's are called."""

    def __init__(self, width):
        super().__init__()
        self.words = nn.Embedding(20, width)

    def forward(self, ids_BT, token_type_ids=None):
        return self.words(ids_BT)


def small_reader():
    """Two layers for ids of which 0 is padding."""
    torch.manual_seed(0)
    layers = [PreNormLayer(16, 2, 32) for _ in range(2)]
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.4)
    embed = MaskedEmbed(WordEmbedding(16), pad_id=0)
    ragged = Ragged(mask_index=1, pad_id=0)
    head = nn.Linear(16, 2)
    network = HaltingNetwork(embed, layers, head, gate_scale=1.0, gate_center=1.0, ragged=ragged)
    return network.eval()


def texts():
    drawn = torch.Generator().manual_seed(2)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS) + 2, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(1, 20, (length,), generator=drawn)
    return ids


@pytest.fixture(
    scope="module", params=[((2, 1.0, 1.0), 1), ((3,), 2)], ids=["each layer", "two layers"]
)
def exported(request, tmp_path_factory):
    """A network, and the bundle that was written of it."""
    options, layers_per_step = request.param
    network = small_vit(*options)
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    bundle = export(
        network,
        HaltingPolicy(0.7),
        folder,
        IMAGES,
        class_names=tuple("abcde"),
        plain=False,
        layers_per_step=layers_per_step,
    )
    return network, bundle


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The same of texts, whose samples are of unequal length."""
    network = small_reader()
    folder = tmp_path_factory.mktemp("reader") / "bundle"
    return network, export(network, HaltingPolicy(0.7), folder, texts())


def step_by_step(bundle):
    """Without the file for single samples."""
    return replace(bundle, single_file=None, single_sha256=None)


@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_session_answers_as_the_masked_pass(exported, threshold, batch_size):
    network, bundle = exported
    session = Session(with_routing_threshold(bundle, threshold), threads=1)
    found = answer_in_batches(session, IMAGES, batch_size=batch_size)
    first_layers = bundle.halting.first_layers
    agreement = compare(found, masked_pass(network, threshold, (IMAGES,), first_layers))
    assert agreement.holds
    assert max(agreement.differences) < 1e-4
    costs = network.costs(IMAGES)
    assert torch.equal(found.macs, costs.macs(found.tokens))  # as they ran
    assert threshold != 0.7 or len(found.tokens.unique()) > 3
    if len(first_layers) == network.num_layers:
        expected = HaltingRunner(network, HaltingPolicy(threshold)).run(IMAGES)
        alike = (found.tokens == expected.tokens).all(1)
        assert alike.sum() >= len(IMAGES) - agreement.moved - 1
        for name in ("output", "confidence", "macs", "exit_index"):
            theirs, ours = getattr(found, name)[alike], getattr(expected, name)[alike]
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    else:  # nothing is dropped between two layers of a step
        assert torch.equal(found.tokens[:, 0], found.tokens[:, 1])


def test_one_graph_and_the_steps_say_the_same_of_single_samples(exported):
    _, bundle = exported
    in_one, in_steps = (
        answer_in_batches(Session(way, threads=1), IMAGES, batch_size=1)
        for way in (bundle, step_by_step(bundle))
    )
    assert torch.equal(in_one.tokens, in_steps.tokens)
    torch.testing.assert_close(in_one.output, in_steps.output, rtol=1e-5, atol=1e-5)


def test_nan_never_halts(exported):
    network, bundle = exported
    images = IMAGES.clone()
    images[3] = float("nan")
    session = Session(with_routing_threshold(bundle, 0.0))
    every = [10] * network.num_layers
    assert session.run(images).tokens[3].tolist() == every
    assert session.run(images[3:4]).tokens.tolist() == [every]
    assert session.run(images[4:5]).tokens.tolist() != [every]


def test_description_is_complete(exported):
    network, bundle = exported
    assert read_bundle(bundle.folder) == bundle
    costs = network.costs(IMAGES)
    assert bundle.family == "halting"
    assert bundle.plain_macs == costs.plain_macs
    assert bundle.halting.fixed_macs == costs.fixed_macs
    assert bundle.halting.token_macs == costs.token_macs
    assert bundle.halting.pair_macs == costs.pair_macs
    assert bundle.num_steps == 2
    assert bundle.halting.first_layers == {2: (0, 1), 3: (0, 2)}[network.num_layers]
    assert bundle.policy == {"kind": "halting", "threshold": 0.7}
    assert {path.name for path in bundle.folder.iterdir()} == {
        "bundle.json",
        *(file.name for file in bundle.files),
    }
    assert "skip" not in json.loads((bundle.folder / "bundle.json").read_text())


def test_each_step_lies_behind_an_if_of_the_one_before(exported):
    """So that no layer of an answered sample is computed."""
    _, bundle = exported
    graph, depth = onnx.load(bundle.folder / "single.onnx").graph, 0
    while branches := [node for node in graph.node if node.op_type == "If"]:
        (branch,) = branches
        assert branch == [node for node in graph.node if node.op_type in ("If", "Gather")][-1]
        graph, depth = branch.attribute[1].g, depth + 1
        graph = next(a.g for a in branch.attribute if a.name == "then_branch")
        assert [node.op_type for node in graph.node][:2] == ["Compress"] * 2
    assert depth == bundle.num_steps - 1


def test_masking_in_the_bundle_says_what_torch_says(exported):
    network, bundle = exported
    session = Session(bundle)
    output, tokens, margin = session.run_every_token(IMAGES)
    with torch.no_grad():
        expected = network(IMAGES, threshold=0.7)
    np.testing.assert_allclose(output, expected.logits, rtol=1e-4, atol=1e-4)
    first_layers = list(bundle.halting.first_layers)
    assert tokens[:, first_layers].tolist() == expected.tokens[:, first_layers].tolist()
    assert margin.shape == tokens.shape
    assert (margin[tokens > 0] >= 0).all()
    assert np.isinf(margin[tokens == 0]).all()
    assert compare(session.run(IMAGES), _all_steps(session, IMAGES)).holds


def test_what_is_of_other_families_is_refused(exported, tmp_path):
    _, bundle = exported
    session = Session(bundle)
    with pytest.raises(InvalidArgumentError, match="family halting: run it in float32"):
        quantize(bundle, tmp_path / "int8", IMAGES)
    with pytest.raises(InvalidArgumentError, match="use with_routing_threshold"):
        with_thresholds(bundle, [0.5])
    with pytest.raises(InvalidArgumentError, match="family halting: its steps give no answers"):
        session.run_step(0, [IMAGES.numpy()])
    with pytest.raises(InvalidArgumentError, match="family halting: it has no gates"):
        session.run_every_block(IMAGES)
    with pytest.raises(ShapeError, match="shape"):
        session.run(IMAGES[:, :, :8])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"token_macs": [1]}, {"threshold": "high"}, {"steps": []}])
def test_damaged_description_is_refused(exported, tmp_path, change):
    _, bundle = exported
    for path in bundle.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "bundle.json").read_text())
    content["halting"] |= change
    (tmp_path / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"bundle\.json is damaged"):
        read_bundle(tmp_path)


def test_steps_and_policies_that_do_not_fit_are_refused(tmp_path, network, skip_network):
    folder = tmp_path / "bundle"
    for count in (0, 4):
        with pytest.raises(InvalidArgumentError, match=rf"\[1, 3\].*Got {count}"):
            export(small_vit(), HaltingPolicy(), folder, IMAGES, layers_per_step=count)
    with pytest.raises(InvalidArgumentError, match="Got HaltingNetwork and GatePolicy"):
        export(small_vit(), GatePolicy(), folder, IMAGES)
    with pytest.raises(InvalidArgumentError, match="Got 2 for a SkipNetwork"):
        export(skip_network, GatePolicy(), folder, IMAGES, layers_per_step=2)
    assert list(tmp_path.iterdir()) == []


# Texts


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_texts_of_unequal_length_are_answered_as_in_torch(reader, batch_size):
    network, bundle = reader
    ids = texts()
    found = answer_in_batches(Session(bundle, threads=1), ids, batch_size=batch_size)
    assert found.tokens[:, 0].tolist() == LENGTHS
    agreement = compare(found, masked_pass(network, 0.7, (ids,)))
    assert agreement.holds
    assert max(agreement.differences) < 1e-4
    assert torch.equal(found.macs, network.costs(ids).macs(found.tokens))
    masked = Session(bundle).run_every_token(ids)
    np.testing.assert_allclose(masked[0], found.output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [[0], [0, 1]])
def test_padding_alone_runs_nothing(reader, rows):
    network, bundle = reader
    ids = torch.tensor([[0, 0, 0], [3, 4, 0]])[rows]
    found = Session(bundle).run(ids)
    with torch.no_grad():
        expected = network(ids, threshold=0.7)
    assert found.tokens[0].tolist() == [0, 0]
    np.testing.assert_allclose(found.output, expected.logits, rtol=1e-4, atol=1e-5)


def test_plain_network_of_texts_is_in_it(reader):
    network, bundle = reader
    with torch.no_grad():
        expected = network.plain()(texts())
    np.testing.assert_allclose(PlainSession(bundle).run(texts()), expected, rtol=1e-4, atol=1e-4)
    assert bundle.plain_macs == network.costs(texts()).plain_macs
