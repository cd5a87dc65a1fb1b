"""Backbones that take inputs by name, and that return logits among other things."""

import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from offramp.errors import BackboneCutError, InvalidArgumentError
from offramp.model.cut import add_exits

CLASSES = 3
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@dataclass
class Answer:
    scores: torch.Tensor
    features: torch.Tensor


RETURNS = {
    "tuple": (lambda y, x, is_training: (x, y), 1),
    "from the end": (lambda y, x, is_training: [x, y], -1),
    "dict": (lambda y, x, is_training: {"features": x, "scores": y}, "scores"),
    "dataclass": (lambda y, x, is_training: Answer(y, x), "scores"),
    "logits": (lambda y, x, is_training: OrderedDict(features=x, logits=y), None),
    "aux in training": (lambda y, x, is_training: (x, y) if is_training else y, None),
    "named in training": (
        lambda y, x, is_training: {"aux": x, "out": y} if is_training else y,
        "out",
    ),
    "more in training": (lambda y, x, is_training: (y, x, x) if is_training else (y, x), 0),
}


class Returns(nn.Module):
    def __init__(self, what, sizes=False):
        super().__init__()
        self.first, self.second, self.aux = (nn.Linear(4, 4) for _ in range(3))
        self.norm, self.drop, self.last = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, CLASSES)
        self.what, self.sizes = what, sizes

    def forward(self, x):
        if self.sizes:  # which torch.fx cannot follow
            batch, _ = x.shape
            x = x.reshape(batch, 4)
        x = torch.relu(self.first(x))
        beside = self.norm(self.aux(x))
        y = self.last(self.drop(torch.relu(self.second(x))))
        return self.what(y, beside, self.training)


def logits_of(returned, place):
    if isinstance(returned, torch.Tensor):
        return returned
    if isinstance(place, str) and isinstance(returned, Answer):
        return getattr(returned, place)
    return (
        returned["logits" if place is None else place]
        if isinstance(returned, dict)
        else (next(each for each in returned if each.shape[1] == CLASSES))
    )


@pytest.mark.parametrize("sizes", [False, True], ids=["fx", "export"])
@pytest.mark.parametrize("case", RETURNS)
def test_logits_are_taken_out_of_what_is_returned(case, sizes):
    torch.manual_seed(0)
    what, output = RETURNS[case]
    backbone = Returns(what, sizes).eval()
    network = add_exits(backbone, at=["first"], num_classes=CLASSES, example=X, output=output)
    for other in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        other.eval()
        for num in (1, 2, 3):
            expected = logits_of(backbone.eval()(X[:num]), output)
            assert torch.equal(other(X[:num])[-1], expected)
            assert torch.equal(other.plain()(X[:num]), expected)
    assert network.costs(X).stage_macs == (16, 16 + 4 * CLASSES)  # the head beside is left out
    for mode in (network, backbone):
        mode.train()
        torch.manual_seed(1)
    first = network(X)[-1]
    torch.manual_seed(1)
    torch.testing.assert_close(first, logits_of(backbone(X), output))
    assert network.backbone_state_dict().keys() == backbone.state_dict().keys()


@pytest.mark.parametrize(
    ("what", "output", "says"),
    [
        (RETURNS["tuple"][0], None, r"tuple of 2, \(3, 4\) and \(3, 3\)\..*output=0"),
        (RETURNS["dict"][0], None, r"dict with 'features', 'scores'\..*output='features'"),
        (RETURNS["tuple"][0], 2, r"the logits in what the backbone returns: tuple of 2.*Got 2"),
        (RETURNS["dict"][0], "logits", "dict with 'features', 'scores'. Got 'logits'"),
        (RETURNS["tuple"][0], 0, r"ends in 3 outputs.*shape \(3, 4\)"),
        (
            lambda y, x, is_training: (y, y) if is_training else y,
            None,
            "in training it returns more .*'output'",
        ),
    ],
)
def test_what_is_not_named_is_refused_in_one_line(what, output, says):
    with pytest.raises((BackboneCutError, InvalidArgumentError), match=says) as raised:
        add_exits(Returns(what), at=["first"], num_classes=CLASSES, example=X, output=output)
    assert "\n" not in str(raised.value)


class Named(nn.Module):
    """Wants the second of its inputs by name: it is not the second of its ``forward``."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(4, CLASSES)

    def forward(self, x, past=None, weight=None, return_all=False, *, shift=None, **others):
        x = torch.relu(self.first(x))
        x = x if weight is None else x * weight
        x = self.second(x if shift is None else x + shift)
        return (self.last(x), x) if return_all else self.last(x)


class Keywords(Named):
    def forward(self, **inputs):
        return super().forward(**inputs)


@pytest.mark.parametrize("names", [("weight",), ("shift",), ("weight", "shift")])
@pytest.mark.parametrize("kind", [Named, Keywords])
def test_inputs_are_bound_by_name_across_a_gap(kind, names):
    torch.manual_seed(0)
    backbone = kind().eval()
    example = {"x": X, **{name: torch.rand(3, 4) for name in names}, "label": torch.zeros(3)}
    network = add_exits(backbone, at=["first"], num_classes=CLASSES, example=example).eval()
    assert network.input_names == ("x", *names)
    inputs = {name: example[name] for name in network.input_names}
    expected = backbone(**inputs)
    assert torch.equal(network(inputs)[-1], expected)
    assert torch.equal(network.plain()(*inputs.values()), expected)
    assert network.train()(inputs)[0].shape == (3, CLASSES)
    assert type(backbone) is kind


class Batch(Named):
    """Takes all in one dict, as a data loader hands it on."""

    def forward(self, batch):
        return super().forward(batch["x"], weight=batch["weight"])


def test_a_forward_that_takes_a_batch_as_a_dict():
    torch.manual_seed(0)
    backbone = Batch().eval()
    batch = {"weight": torch.rand(3, 4), "x": X, "label": torch.zeros(3)}
    network = add_exits(backbone, at=["first"], num_classes=CLASSES, example=batch).eval()
    assert network.input_names == ("weight", "x")
    for other in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(batch)[-1], backbone(batch))
    with pytest.raises(InvalidArgumentError, match="inputs in the order batch"):
        add_exits(backbone, at=["first"], num_classes=CLASSES, example={"x": X})


def test_what_is_needed_must_not_be_left_out():
    with pytest.raises(InvalidArgumentError, match="in the order x, past, weight"):
        add_exits(Named(), at=["first"], num_classes=CLASSES, example={"weight": X})


def test_a_mask_that_is_third_in_forward():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GPT2Config(**sizes, **ids, num_labels=CLASSES)
    backbone = transformers.GPT2ForSequenceClassification(config).eval()
    given = {
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "input_ids": torch.tensor([[3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 0, 0]]),
    }
    at = ["transformer.h.0"]
    network = add_exits(backbone, at=at, num_classes=CLASSES, example=given).eval()
    assert network.input_names == ("input_ids", "attention_mask")
    assert torch.equal(network(given)[-1], backbone(**given).logits)
    assert network.ragged is not None
