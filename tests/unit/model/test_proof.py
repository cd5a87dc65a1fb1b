"""What a comparison of a backbone with its pieces finds, and what it leaves alone."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_backbones import BackboneOf
from torch import nn

from offramp.model.draws import draw, vocabularies_of
from offramp.model.proof import find_difference

ZEROS = torch.zeros(1, 6)


def zero(layer):
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def two(**children):
    return {"a": nn.Linear(6, 6, bias=False), "b": nn.Linear(6, 3, bias=False), **children}


HIDDEN = {
    "relu behind zeros": (lambda m, x: m.b(F.relu(m.a(x))), {}),
    "scale": (lambda m, x: m.b(m.a(x)) * 2, {}),
    "relu before a zero classifier": (
        lambda m, x: m.b(F.relu(m.a(x))),
        {"b": zero(nn.Linear(6, 3))},
    ),
    "branch that starts at zero": (
        lambda m, x: m.b(m.a(x)) + m.z(x),
        {"z": zero(nn.Linear(6, 3))},
    ),
    "dropout in training": (lambda m, x: m.b(F.dropout(m.a(x), 0.5, m.training)), {}),
    "a value": (lambda m, x: m.b(m.a(x)) if x.sum() < 1 else m.b(F.relu(m.a(x))), {}),
    "two samples": (lambda m, x: m.b(m.a(x)) if len(x) < 2 else m.b(F.relu(m.a(x))), {}),
    "one sample": (lambda m, x: m.b(m.a(x)) if len(x) > 1 else m.b(F.relu(m.a(x))), {}),
    "mean over the batch": (lambda m, x: m.b(m.a(x) - m.a(x).mean(0)), {}),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_an_example_of_zeros_hides_is_found(name):
    run, children = HIDDEN[name]
    children = two(**children)
    backbone = BackboneOf(run, **children)
    pieces = nn.Sequential(children["a"], children["b"])
    with torch.no_grad():
        assert torch.equal(backbone.eval()(ZEROS), pieces.eval()(ZEROS))
    assert find_difference(backbone, pieces, (ZEROS,)) is not None
    assert find_difference(pieces, nn.Sequential(*pieces), (ZEROS,)) is None


def test_an_equal_network_whose_samples_depend_on_their_batch_is_no_equal():
    backbone = BackboneOf(lambda m, x: m.b(x - x.mean(0)), b=nn.Linear(6, 3))
    same = BackboneOf(lambda m, x: m.b(x - x.mean(0)), b=backbone.b)
    assert "other samples of its batch" in find_difference(backbone, same, (ZEROS,))


def test_kernels_that_differ_by_the_size_of_a_batch_are_no_dependence():
    class Chaotic(nn.Module):
        """Blows up, with disturbed weights, what a batch of another size rounds otherwise."""

        def __init__(self, *, by_others=0.0):
            super().__init__()
            self.by_others = by_others
            self.b = nn.Linear(6, 3)
            self.factor = nn.Parameter(torch.zeros(8))

        def forward(self, x):
            rounding = 1e-7 if len(x) == 1 else 0.0
            blown_up = rounding * (500 * self.factor.abs().max()).exp()
            return self.b(x + blown_up + self.by_others * x.mean(0))

    inputs = (torch.randn(2, 6),)
    chaotic = Chaotic()
    assert find_difference(chaotic, nn.Sequential(chaotic), inputs) is None
    dependent = Chaotic(by_others=9.0)
    assert "other samples" in find_difference(dependent, nn.Sequential(dependent), inputs)


def test_statistics_must_move_alike():
    norm = nn.BatchNorm1d(6)
    backbone = BackboneOf(lambda m, x: m.norm(x), norm=norm)
    twice = BackboneOf(lambda m, x: (m.norm(x), m.norm(x))[0], norm=norm)
    assert "buffer 'norm.running_mean'" in find_difference(backbone, twice, (ZEROS,))


class FailsAtTheEnd(nn.Module):
    """Fails once its parameters were disturbed."""

    def __init__(self, part):
        super().__init__()
        self.part, self.start = part, part[0].weight.detach().clone()

    def forward(self, x):
        if not torch.equal(self.part[0].weight, self.start):
            raise RuntimeError("disturbed")
        return self.part(x)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was(fails):
    backbone = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6))
    backbone[3].weight = backbone[0].weight  # tied
    backbone.append(zero(nn.Linear(6, 3))).train()
    backbone[1].eval()
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    versions = [parameter._version for parameter in backbone.parameters()]
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    replacement = FailsAtTheEnd(backbone) if fails else nn.Sequential(*backbone)
    why = find_difference(backbone, replacement, (torch.randn(2, 6).fill_(1.0),))
    assert ("disturbed" in (why or "")) is fails
    assert all(torch.equal(before[key], t) for key, t in backbone.state_dict().items())
    assert versions == [parameter._version for parameter in backbone.parameters()]
    assert [module.training for module in backbone] == [True, False, True, True, True]
    assert random.getstate() == numbers[1]
    assert np.random.get_state()[1].tolist() == numbers[2]


def test_the_caller_s_random_numbers_go_on():
    backbone = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))
    before = torch.get_rng_state()
    find_difference(backbone, nn.Sequential(*backbone), (ZEROS,))
    assert torch.equal(torch.get_rng_state(), before)


def test_ids_stay_within_the_vocabulary_and_masks_are_never_empty():
    embedding = nn.Embedding(7, 4)
    backbone = BackboneOf(lambda m, x, y: m.e(x) * y[..., None], inputs=2, e=embedding)
    example = torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)
    vocabularies = vocabularies_of(backbone, example)
    assert vocabularies == [7, None]
    ids, mask = draw(example, 200, vocabularies, "any")
    assert ids.unique().tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert mask.sum(1).unique().tolist() == [1, 2, 3, 4]
    assert (mask.diff(dim=1) <= 0).all()  # padding comes last


def test_draws_are_of_the_example_s_types_and_ranges():
    example = (
        torch.rand(3, 2, 4).double(),
        torch.tensor([[4], [9], [9]]),
        torch.zeros(3, 4, dtype=torch.bool),
        torch.zeros(3, 4, dtype=torch.uint8) + 7,
    )
    floats, integers, mask, pixels = draw(example, 50, [None] * 4, "any")
    assert floats.shape == (50, 2, 4)
    assert floats.dtype == torch.float64
    assert floats.min() < -1
    assert floats.max() > 2
    assert integers.unique().tolist() == [4, 9]
    assert not mask.all(1).any()
    assert mask.any(1).all()
    assert pixels.dtype == torch.uint8
    assert pixels.unique().numel() > 50
    within = draw(example, 50, [None] * 4, "example's")[0]
    assert within.min() >= 0
    assert within.max() <= 1
    assert torch.equal(
        draw(example, 4, [None] * 4, "example")[1], torch.tensor([[4], [9], [9], [4]])
    )


def test_a_backbone_that_takes_only_some_values_is_compared_on_those():
    def run(m, x):
        if x.min() < 0 or x.max() > 1:
            raise ValueError("pixels in [0, 1]")
        return m.b(F.relu(m.a(x)))

    children = two()
    backbone = BackboneOf(run, **children)
    inputs = (torch.linspace(0, 1, 12).reshape(2, 6),)
    assert find_difference(backbone, nn.Sequential(*children.values()), inputs) is not None
    same = nn.Sequential(children["a"], nn.ReLU(), children["b"])
    assert find_difference(backbone, same, inputs) is None
