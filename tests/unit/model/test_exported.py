"""Cutting backbones by the graph that torch.export writes down: what torch.fx cannot follow."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from offramp.errors import BackboneCutError
from offramp.model.cut import add_exits
from offramp.model.exported import Exported
from offramp.model.graph import TracedStage

CLASSES = 3
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(1, 20, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])


class AsksForSizes(nn.Module):
    """Sizes at the top, an assertion, a loop, normalised batches, noise and dropout in training."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])
        self.head = nn.Linear(8 * 16, CLASSES)

    def forward(self, x):
        batch, channels, height, width = x.shape
        assert (channels, height) == (3, 8), "an image of another size"
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = x + F.dropout(F.relu(block(x)), 0.5, training=self.training)
        return self.head(x.reshape(batch, channels * height * width // 6 * 4))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, mask):
        length = x.shape[1]
        square = torch.zeros(length, length, device=x.device)
        square[:, 0] = 0.5  # written into, for each layer again
        hidden = mask[:, None, :].expand(-1, length, -1) == 0
        scores = (x @ x.transpose(1, 2) + square).masked_fill(hidden, -1e9)
        return self.norm(x + scores.softmax(-1) @ x), scores


class Text(nn.Module):
    """Layers that return a tuple; positions and masks are made of sizes and of the mask."""

    def __init__(self, width=8):
        super().__init__()
        self.words = nn.Embedding(20, width)
        self.places = nn.Embedding(16, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(3)])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            x, _ = layer(x, attention_mask)
        return self.head(x[:, 0])


def test_sizes_an_assertion_and_a_loop():
    torch.manual_seed(0)
    backbone = AsksForSizes()
    network = add_exits(backbone, at=["blocks.0", "blocks.1"], num_classes=CLASSES, example=IMAGES)
    assert all(isinstance(stage, TracedStage) for stage in network.stages)
    network.eval()
    for batch in (1, 3):
        images = torch.randn(batch, 3, 8, 8)
        assert torch.equal(network(images)[-1], backbone.eval()(images))
    own = {id(parameter) for parameter in network.stages.parameters()}
    assert own == {id(parameter) for parameter in backbone.parameters()}


def test_training_moves_weights_and_statistics_and_draws_dropout_anew():
    torch.manual_seed(0)
    backbone = AsksForSizes()
    network = add_exits(backbone, at=["blocks.1"], num_classes=CLASSES, example=IMAGES).train()
    before = copy.deepcopy(backbone.state_dict())
    first, second = (network(IMAGES)[-1] for _ in range(2))
    assert not torch.equal(first, second)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    sum(logits.square().sum() for logits in network(IMAGES)).backward()
    optimizer.step()
    after = backbone.state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert int(after["norm.num_batches_tracked"]) == 3
    network.eval()
    assert torch.equal(network(IMAGES)[-1], backbone.eval()(IMAGES))


def test_a_stage_can_be_copied_and_pickled():
    network = add_exits(AsksForSizes(), at=["blocks.1"], num_classes=CLASSES, example=IMAGES)
    network.eval()
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(IMAGES)[-1], network(IMAGES)[-1])
        assert other.train()(IMAGES)[-1].shape == (2, CLASSES)


def test_a_mask_crosses_beside_the_tokens_and_padding_is_cut_off():
    torch.manual_seed(0)
    backbone = Text()
    example = (IDS, MASK)
    network = add_exits(backbone, at=["layers.0", "layers.1"], num_classes=CLASSES, example=example)
    network.eval()
    assert [tuple(f.shape) for f in network.run_stage(0, (IDS, MASK))] == [(2, 7, 8), (2, 7)]
    assert network.ragged is not None
    for length in (2, 7, 11):
        ids, mask = torch.randint(1, 20, (3, length)), torch.ones(3, length, dtype=torch.int64)
        assert torch.equal(network(ids, mask)[-1], backbone.eval()(ids, mask))
    first = network.trimmed((IDS[:1], MASK[:1]))
    assert first[0].shape == (1, 5)
    torch.testing.assert_close(network(*first)[0], network(IDS, MASK)[0][:1])
    # A tokenizer's dict, and no mask at all.
    given = {"attention_mask": MASK, "input_ids": IDS}
    assert torch.equal(network(given)[-1], network(IDS, MASK)[-1])
    assert torch.equal(network(IDS)[-1], network(IDS, torch.ones_like(IDS))[-1])


def test_what_gradients_are_switched_off_for_stays_without():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.below, self.middle, self.above = (nn.Linear(4, 4) for _ in range(3))
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            assert x.dim() == 2
            with torch.no_grad():
                x = self.below(x)
            return self.head(self.above(F.relu(self.middle(x))))

    backbone = Frozen()
    network = add_exits(backbone, at=["middle"], num_classes=CLASSES, example=torch.randn(2, 4))
    network(torch.randn(2, 4))[-1].sum().backward()
    assert backbone.below.weight.grad is None
    assert backbone.middle.weight.grad is not None


def test_a_module_that_runs_twice_is_no_place_and_its_neighbours_are():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.block, self.after = (nn.Linear(4, 4) for _ in range(3))
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            x = self.start(x.reshape(x.shape[0], -1))
            return self.head(self.after(F.relu(self.block(F.relu(self.block(x))))))

    graph = Exported(Twice(), (torch.randn(2, 4),))
    assert list(graph.places) == ["start", "after"]
    assert graph.refused["block"] == "it runs more than once"


def test_a_branch_on_values_is_refused_with_its_line():
    class Decides(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            x = self.first(x)
            if x.max() > 0:
                x = x * 2
            return self.second(x)

    with pytest.raises(BackboneCutError, match=r"test_exported.py, `if x.max\(\) > 0:`"):
        add_exits(Decides(), at=["first"], num_classes=CLASSES, example=torch.randn(2, 4))


class Windows(nn.Module):
    """Maps in windows and back, as Swin does: numbers are made of the size of the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(3, n) for n in (3, 3, CLASSES))
        self.token = nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, x):
        tokens = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).mT], 1)
        for layer in (self.first, self.second):
            rows = F.relu(layer(tokens[:, 1:])).reshape(-1, 4, 4, 3)
            count = int(rows.shape[0] / (8 * 8 / 4 / 4))
            assert isinstance(count, int | torch.SymInt)
            tokens = torch.cat([tokens[:, :1], rows.reshape(count, 64, 3)], 1)
        return self.last(tokens.mean(1))


def test_numbers_made_of_the_size_of_the_batch_stay_sizes():
    torch.manual_seed(0)
    backbone = Windows().eval()
    network = add_exits(
        backbone, at="auto", num_exits=2, num_classes=CLASSES, example=IMAGES
    ).eval()
    for num in (1, 2, 3):
        images = torch.randn(num, 3, 8, 8)
        assert torch.equal(network(images)[-1], backbone(images))
    assert "len" not in globals()
    assert "int" not in globals()


def test_attention_is_laid_out_otherwise_for_another_batch():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Data2VecVisionConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=64,
        num_labels=CLASSES,
    )
    backbone = transformers.Data2VecVisionForImageClassification(config).eval()
    images = torch.randn(2, 3, 64, 64)
    network = add_exits(
        backbone, at="auto", num_exits=3, num_classes=CLASSES, example=images
    ).eval()
    for num in (1, 2):
        assert torch.equal(network(images[:num])[-1], backbone(images[:num]).logits)


def test_autocast_inside_is_refused_in_plain_words():
    class Casts(AsksForSizes):
        def forward(self, x):
            with torch.autocast("cpu"):
                return super().forward(x).float()

    with pytest.raises(BackboneCutError, match=r"it switches autocast on.* take that out of its"):
        add_exits(Casts(), at=["stem"], num_classes=CLASSES, example=IMAGES)


def test_exits_of_a_causal_model_read_the_last_token():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20,
        n_embd=8,
        n_layer=2,
        n_head=2,
        n_positions=16,
        num_labels=CLASSES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    backbone = transformers.GPT2ForSequenceClassification(config)
    ids = IDS.clone()
    ids[0, 5:] = 0
    network = add_exits(backbone, at=["transformer.h.0"], num_classes=CLASSES, example=ids).eval()
    assert torch.equal(network(ids)[-1], backbone.eval()(ids).logits)
    assert network.exits[0].head.pool == "last"
    changed = ids.clone()
    changed[0, 6] = 5
    changed[0, 5] = 0
    torch.testing.assert_close(network(ids[:1, :5])[0], network(ids)[0][:1])
    assert not torch.equal(network(changed)[0][0], network(ids)[0][0])
