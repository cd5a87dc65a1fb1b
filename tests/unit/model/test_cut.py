from collections import OrderedDict

import pytest
import torch
from torch import nn

from offramp.errors import BackboneCutError, InvalidArgumentError
from offramp.model.cut import add_exits

CLASSES = 3


class InOrder(nn.Module):
    """Calls its children one after the other, in a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Conv2d(4, 6, 3, stride=2)
        self.flat = nn.Flatten()
        self.classifier = nn.Linear(6 * 3 * 3, CLASSES)

    def forward(self, x):
        return self.classifier(self.flat(self.body(self.stem(x))))


class Residual(nn.Module):
    """Its children do not run one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(x + self.first(x))


class OutOfOrder(Residual):
    """Names its children in another order than they run, so that chaining them fails."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.last = nn.Linear(5, CLASSES)
        self.first, self.last = self.last, self.first

    def forward(self, x):
        return self.first(self.last(x))


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES)
    )


def nested() -> nn.Sequential:
    blocks = nn.Sequential(
        OrderedDict(one=nn.Sequential(nn.Linear(5, 5), nn.ReLU()), two=nn.Linear(5, 8))
    )
    return nn.Sequential(OrderedDict(stem=nn.Linear(6, 5), blocks=blocks, last=nn.Linear(8, 3)))


VECTORS, IMAGES = (2, 6), (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("backbone", "at", "shape"),
    [
        pytest.param(perceptron(), [], VECTORS, id="no cut"),
        pytest.param(perceptron(), ["1", "3"], VECTORS, id="sequential"),
        pytest.param(nested(), ["blocks.one.1", "blocks"], VECTORS, id="inside and whole"),
        pytest.param(nested(), ["stem", "blocks.one.0", "blocks.two"], VECTORS, id="nested"),
        pytest.param(nested(), ["blocks"], VECTORS, id="a whole block"),
        pytest.param(InOrder(), ["stem.2", "body", "flat"], IMAGES, id="own forward"),
    ],
)
def test_final_exit_equals_the_backbone(backbone, at, shape):
    x = torch.randn(shape)
    network = add_exits(backbone, at=at, num_classes=CLASSES, example=x).eval()
    backbone.eval()
    outputs = network(torch.cat([x, -x]))
    assert [tuple(output.shape) for output in outputs] == [(4, CLASSES)] * (len(at) + 1)
    assert torch.equal(outputs[-1], backbone(torch.cat([x, -x])))
    assert torch.equal(network.plain()(x), backbone(x))


def test_exits_read_the_features_at_their_path():
    backbone = perceptron()
    heads = [nn.Linear(5, CLASSES), nn.Linear(8, CLASSES)]
    x = torch.randn(VECTORS)
    network = add_exits(backbone, at=["1", "3"], num_classes=CLASSES, example=x, heads=heads)
    first, second, _ = network(x)
    assert torch.equal(first, heads[0](backbone[:2](x)))
    assert torch.equal(second, heads[1](backbone[:4](x)))


def test_modules_are_shared_not_copied():
    backbone = perceptron()
    network = add_exits(backbone, at=["1"], num_classes=CLASSES, example=torch.randn(VECTORS))
    assert {id(p) for p in backbone.parameters()} <= {id(p) for p in network.parameters()}


def test_a_module_that_is_used_twice_runs_twice():
    relu = nn.ReLU()
    backbone = nn.Sequential(nn.Linear(6, 5), relu, nn.Linear(5, 8), relu, nn.Linear(8, CLASSES))
    x = torch.randn(VECTORS)
    network = add_exits(backbone, at=["1"], num_classes=CLASSES, example=x)
    assert torch.equal(network(x)[-1], backbone(x))


def test_cutting_leaves_modes_and_statistics_alone():
    backbone = InOrder().train()
    backbone.stem.eval()
    add_exits(backbone, at=["body"], num_classes=CLASSES, example=torch.randn(IMAGES))
    assert backbone.training
    assert not backbone.stem[1].training
    assert backbone.stem[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("at", "named"),
    [
        (["blocks.on"], "blocks.one"),
        (["stm"], "stem"),
        (["blocks.one.7"], "blocks.one.0"),
        ([""], "stem"),
    ],
)
def test_unknown_path_names_the_nearest(at, named):
    with pytest.raises(BackboneCutError) as caught:
        add_exits(nested(), at=at, num_classes=CLASSES, example=torch.randn(VECTORS))
    message = str(caught.value)
    assert repr(at[0]) in message
    assert named in message.partition("Nearest")[2]


def test_backbone_without_children_has_no_path():
    with pytest.raises(BackboneCutError, match="Nearest: none"):
        add_exits(nn.Linear(6, 3), at=["0"], num_classes=CLASSES, example=torch.randn(VECTORS))


@pytest.mark.parametrize("at", [["3", "1"], ["1", "1"], ["1", "4"]])
def test_cuts_must_be_in_order_once_each_and_before_the_end(at):
    with pytest.raises(BackboneCutError, match=f"before the last module .*{', '.join(at)}"):
        add_exits(perceptron(), at=at, num_classes=CLASSES, example=torch.randn(VECTORS))


@pytest.mark.parametrize("backbone", [Residual(), OutOfOrder(), nn.LSTM(6, CLASSES)])
def test_backbone_whose_children_do_not_run_in_order(backbone):
    at = [] if isinstance(backbone, nn.LSTM) else ["first"]
    with pytest.raises(BackboneCutError, match="do not run one after the other"):
        add_exits(backbone, at=at, num_classes=CLASSES, example=torch.randn(VECTORS))


def test_backbone_with_another_number_of_outputs():
    with pytest.raises(InvalidArgumentError, match=r"4 outputs.*\(2, 3\)"):
        add_exits(perceptron(), at=["1"], num_classes=4, example=torch.randn(VECTORS))


def test_one_head_for_each_cut():
    with pytest.raises(InvalidArgumentError, match=r"each of the 2 cuts. Got 1"):
        add_exits(
            perceptron(),
            at=["1", "3"],
            num_classes=CLASSES,
            example=torch.randn(VECTORS),
            heads=[nn.Linear(5, CLASSES)],
        )


def test_the_example_is_left_as_it_was():
    backbone = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    example = torch.full((1, 4), -1.0)
    add_exits(backbone, at=["0"], num_classes=3, example=example)
    assert (example == -1).all()
