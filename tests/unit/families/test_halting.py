"""Dropping tokens that have halted against computing and masking them."""

import pytest
import torch
from torch import nn

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.families.agreement import answer_in_batches
from offramp.families.halting import HaltingRunner, masked_pass
from offramp.measure.agreement import compare
from offramp.model.ragged import Ragged
from offramp.policy.routing_policy import HaltingPolicy
from offramp.routing.halting import HaltingNetwork
from offramp.routing.token_parts import MaskedEmbed
from offramp.zoo.vit import PreNormLayer

IMAGES = torch.randn(70, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class WordEmbedding(nn.Module):
    """Embeddings as BERT's are called."""

    def __init__(self, width):
        super().__init__()
        self.words = nn.Embedding(20, width)

    def forward(self, ids_BT, token_type_ids=None):
        return self.words(ids_BT)


@pytest.fixture
def text_network():
    """Three layers for ids of which 0 is padding."""
    layers = [PreNormLayer(16, 2, 32) for _ in range(3)]
    network = HaltingNetwork(
        MaskedEmbed(WordEmbedding(16), pad_id=0),
        layers,
        nn.Linear(16, 2),
        gate_scale=1.0,
        gate_center=1.0,
        ragged=Ragged(mask_index=1, pad_id=0),
    )
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.4)
    return network.eval()


@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.99, 1.0])
def test_dropping_equals_masking(halting_network, batch_size, threshold):
    runner = HaltingRunner(halting_network, HaltingPolicy(threshold))
    before = IMAGES.clone()
    found = answer_in_batches(runner, IMAGES, batch_size=batch_size)
    assert torch.equal(IMAGES, before)
    agreement = compare(found, masked_pass(halting_network, threshold, (IMAGES,)))
    assert agreement.holds
    assert max(agreement.differences) < 1e-4
    with torch.no_grad():
        expected = halting_network(IMAGES, threshold=threshold)
    assert (found.tokens == expected.tokens).all(1).sum() >= len(IMAGES) - agreement.moved
    if threshold == 0:
        assert found.tokens.tolist() == [[10, 0, 0, 0]] * len(IMAGES)
    else:
        share = found.tokens.double().mean() / 10
        assert 0.3 < share < 0.95
        assert (found.tokens[:, -1] == 0).any() or threshold > 0.5  # some leave as a whole


def test_tokens_never_come_back_and_all_run_the_first_layer(halting_network):
    tokens = HaltingRunner(halting_network, HaltingPolicy(0.7)).run(IMAGES).tokens
    assert (tokens[:, 0] == 10).all()
    assert (tokens.diff(dim=1) <= 0).all()
    assert tokens[:, -1].unique().numel() > 2


def test_what_is_dropped_is_not_computed_and_macs_say_so(halting_network):
    ran = []
    for index, layer in enumerate(halting_network.layers):
        layer.mlp.register_forward_hook(
            lambda module, inputs, output, index=index: ran.append((index, len(output)))
        )
    runner = HaltingRunner(halting_network, HaltingPolicy(0.7))
    runner.run(IMAGES[:20])  # counts MACs once
    ran.clear()
    result = runner.run(IMAGES[:20])
    assert ran == list(enumerate(result.tokens.sum(0).tolist()))
    costs = halting_network.costs(IMAGES)
    assert torch.equal(result.macs, costs.macs(result.tokens))
    assert result.macs.double().mean() < costs.plain_macs


def test_every_sample_leaves_by_the_only_exit(halting_network):
    result = HaltingRunner(halting_network).run(IMAGES)
    assert result.exit_index.tolist() == [0] * len(IMAGES)
    assert result.blocks is None
    torch.testing.assert_close(result.confidence, result.output.softmax(-1).amax(-1))


def test_nan_never_halts(halting_network):
    images = IMAGES[:4].clone()
    images[2] = float("nan")
    result = HaltingRunner(halting_network, HaltingPolicy(0.0)).run(images)
    assert result.tokens.tolist() == [[10, 0, 0, 0]] * 2 + [[10] * 4] + [[10, 0, 0, 0]]
    assert result.output[2].isnan().all()
    assert result.output[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_padding_of_texts_is_never_a_token(text_network, batch_size):
    lengths = [1, 7, 3, 12, 5, 5, 9, 2, 4]
    ids = torch.zeros(9, 12, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, 20, (length,))
    runner = HaltingRunner(text_network, HaltingPolicy(0.8))
    found = answer_in_batches(runner, ids, batch_size=batch_size)
    assert found.tokens[:, 0].tolist() == lengths
    agreement = compare(found, masked_pass(text_network, 0.8, (ids,)))
    assert agreement.holds
    assert max(agreement.differences) < 1e-4
    costs = text_network.costs(ids)
    assert torch.equal(found.macs, costs.macs(found.tokens))
    assert (found.macs <= costs.macs_of_length(torch.tensor(lengths))).all()


def test_padding_in_front_of_a_text_is_refused(text_network):
    ids = torch.tensor([[3, 4, 5], [0, 6, 7]])
    with pytest.raises(ShapeError, match="before the tokens of sample 1: pad at the end"):
        HaltingRunner(text_network).run(ids)


def test_a_text_of_padding_alone_runs_nothing(text_network):
    ids = torch.tensor([[0, 0, 0], [3, 4, 0]])
    runner = HaltingRunner(text_network)
    both, alone = runner.run(ids), runner.run(ids[:1])
    with torch.no_grad():
        expected = text_network(ids, threshold=0.99)
    assert both.tokens[0].tolist() == alone.tokens[0].tolist() == [0, 0, 0]
    torch.testing.assert_close(both.output, expected.logits)
    torch.testing.assert_close(alone.output, expected.logits[:1])


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_must_be_in_range(threshold):
    with pytest.raises(InvalidArgumentError, match=r"\[0, 1\]"):
        HaltingPolicy(threshold)
