"""Whatever add_exits returns equals the backbone, in both modes, pickled and copied too."""

import contextlib
import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import nn

from offramp.errors import OfframpError
from offramp.model.cut import add_exits, cut_paths

# Tests of each way to cut run the same lines.
pytestmark = pytest.mark.no_cover

WIDTH, CLASSES = 6, 3

PLAIN = {
    "module": lambda m, part, x: part(x),
    "relu": lambda m, part, x: F.relu(part(x)),
    "shortcut": lambda m, part, x: x + part(x),
    "scaled shortcut": lambda m, part, x: x + m.gamma * part(x),
    "offset": lambda m, part, x: part(x) + m.offset,
    "scale": lambda m, part, x: part(x) * 0.5,
    "in place": lambda m, part, x: F.relu_(part(x)),
    "twice": lambda m, part, x: part(part(x)),
}
BY_MODE = {
    "dropout": lambda m, part, x: F.dropout(part(x), 0.5, training=m.training),
    "batch norm": lambda m, part, x: F.batch_norm(part(x), m.mean, m.var, training=m.training),
    "noise": lambda m, part, x: part(x) + torch.randn_like(x) if m.training else part(x),
    "off": lambda m, part, x: F.relu(part(x)) if m.training and m.aux else part(x),
}
BY_VALUE = {
    "value": lambda m, part, x: F.relu(part(x)) if x.sum() > 0 else part(x),
    "batch size": lambda m, part, x: F.relu(part(x)) if x.shape[0] == 1 else part(x),
    "batch mean": lambda m, part, x: part(x) - x.mean(0),
    "no gradient": lambda m, part, x: _without_gradient(part, x),
}
STEPS = PLAIN | BY_MODE | BY_VALUE
PARTS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "zero": lambda: _zero(nn.Linear(WIDTH, WIDTH)),
    "no bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "norm": lambda: nn.BatchNorm1d(WIDTH),
    "dropout": lambda: nn.Dropout(0.5),
    "dropout in place": lambda: nn.Dropout(0.5, inplace=True),
    "relu in place": lambda: nn.ReLU(inplace=True),
    "sequence": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "nested": lambda: Backbone([("linear", "dropout")]),
}


def _zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _without_gradient(part, x):
    with torch.no_grad():
        return part(x)


class Backbone(nn.Module):
    """Steps of a module and what happens around it."""

    def __init__(self, steps, *, last=None):
        super().__init__()
        self.parts = nn.ModuleList(PARTS[part]() for part, _ in steps)
        self.steps, self.last, self.aux = [step for _, step in steps], last, False
        self.gamma = nn.Parameter(torch.zeros(WIDTH))
        self.offset = nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def forward(self, x):
        for step, part in zip(self.steps, self.parts, strict=True):
            x = STEPS[step](self, part, x)
        return x if self.last is None else self.last(x)


@st.composite
def backbones(draw):
    names = st.sampled_from([*PLAIN, *BY_MODE] * 2 + [*BY_VALUE])
    steps = draw(st.lists(st.tuples(st.sampled_from([*PARTS]), names), min_size=1, max_size=4))
    last = nn.Linear(WIDTH, CLASSES)
    if draw(st.booleans()):
        return Backbone(steps, last=_zero(last) if draw(st.booleans()) else last)
    return nn.Sequential(*(PARTS[part]() for part, _ in steps), last)


def output_of(module, x, *, is_training):
    """What a copy of a module gives, with the same random numbers."""
    module = copy.deepcopy(module).train(is_training)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return module(x.clone())


def fill_zeros(module):
    """As training does: what starts at zero does not stay there."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(backbone=backbones(), zeros=st.booleans(), seed=st.integers(0, 99), data=st.data())
def test_a_cut_network_is_the_backbone_or_refused(backbone, zeros, seed, data):
    torch.manual_seed(seed)
    example = torch.zeros(1, WIDTH) if zeros else torch.randn(2, WIDTH)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    network = None
    with contextlib.suppress(OfframpError):
        paths = cut_paths(backbone, example)
        at = [data.draw(st.sampled_from(paths))] if paths else []
        network = add_exits(backbone, at=at, num_classes=CLASSES, example=example)
    assert all(torch.equal(before[key], t) for key, t in backbone.state_dict().items())
    if network is None:
        return
    fill_zeros(backbone)
    pickled = pickle.loads(pickle.dumps(network.train(data.draw(st.booleans()))))
    for made in (network, pickled, copy.deepcopy(network)):
        for is_training, batch_size in ((False, 1), (False, 4), (True, 3)):
            x = 2 * torch.randn(batch_size, WIDTH)
            expected = output_of(backbone, x, is_training=is_training)
            found = output_of(made.plain(), x, is_training=is_training)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert found.requires_grad == expected.requires_grad
