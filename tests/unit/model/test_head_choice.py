import pytest
import torch
from torch import nn

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.model.cut import add_exits
from offramp.model.heads import MeanHead

CLASSES = 3
X = torch.randn(2, 8)
IMAGES = torch.randn(2, 3, 16, 16)


def perceptron():
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES)
    )


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.linear(x), x


class FailsInTraining(nn.Linear):
    def forward(self, x):
        assert not self.training, "no training"
        return super().forward(x)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        pytest.param(nn.Linear(16, 4), r"returns torch.float32 of shape \(2, 4\)", id="classes"),
        pytest.param(nn.Linear(17, 3), r"fails: .*2x16 and 17x3", id="width"),
        pytest.param(Twice(), "returns tuple", id="tuple"),
        pytest.param(nn.Identity(), r"returns .* of shape \(2, 16\)", id="identity"),
        pytest.param(FailsInTraining(16, 3), "fails: no training", id="training"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_at_once(head, message):
    heads = [nn.Linear(16, CLASSES), head]
    with pytest.raises(
        ShapeError, match=r"features of shape \(2, 16\) to logits of shape \(2, 3\) after '3'"
    ) as caught:
        add_exits(perceptron(), at=["1", "3"], num_classes=CLASSES, example=X, heads=heads)
    assert caught.match(rf"heads\[1\] \({type(head).__name__}\) {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        pytest.param([nn.Linear(16, 3), nn.Linear], r"heads\[1\].* class Linear", id="class"),
        pytest.param([lambda x: x, nn.Linear(16, 3)], r"heads\[0\].* function", id="function"),
        pytest.param([nn.Linear(16, 3)] * 2, r"heads\[1\].* copy\.deepcopy", id="same twice"),
        pytest.param(nn.Linear(16, 3), "Got one Linear: put it in a list", id="no list"),
        pytest.param(3, "Got one int: put it in a list", id="number"),
        pytest.param(nn.Sequential(nn.ReLU(), nn.Linear(16, 3)), "Got one Sequential", id="one"),
        pytest.param([], r"2 cuts\. Got 0", id="none"),
    ],
)
def test_heads_that_are_no_list_of_modules_are_refused(heads, message):
    with pytest.raises(InvalidArgumentError, match=message):
        add_exits(perceptron(), at=["1", "3"], num_classes=CLASSES, example=X, heads=heads)


def test_running_a_head_leaves_its_modes_and_statistics_alone():
    head = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(), nn.LazyLinear(CLASSES))
    head[1].eval()
    add_exits(perceptron(), at=["1"], num_classes=CLASSES, example=X[:1], heads=[head])
    assert [module.training for module in head] == [True, False, True]
    assert head[0].num_batches_tracked == 0
    assert head[2].in_features == 16


def test_heads_take_the_dtype_of_the_features():
    backbone, heads = perceptron().double(), nn.ModuleList([nn.Linear(16, CLASSES)])
    network = add_exits(backbone, at=["1"], num_classes=3, example=X.double(), heads=heads)
    assert heads[0].weight.dtype == torch.float64
    assert network(X.double())[0].dtype == torch.float64
    network = add_exits(backbone, at=["1"], num_classes=3, example=X.double())
    assert network.exits[0].weight.dtype == torch.float64


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((1, 2))


def test_chosen_heads_read_the_channels_of_maps_with_channels_last():
    backbone = nn.Sequential(
        nn.Conv2d(3, 4, 4, 4), ChannelsLast(), nn.Linear(4, 4), Mean(), nn.Linear(4, CLASSES)
    )
    network = add_exits(backbone, at=["0", "1", "2"], num_classes=3, example=IMAGES * 0).eval()
    first, *others = network.exits[:-1]
    assert isinstance(first[0], nn.AdaptiveAvgPool2d)
    assert all(isinstance(head, MeanHead) for head in others)
    features = network.run_stage(1, network.run_stage(0, (IMAGES,)))[0]
    expected = features.sum((1, 2)) / 16 @ others[0].classify.weight.T + others[0].classify.bias
    torch.testing.assert_close(network(IMAGES)[1], expected)


def test_where_the_axis_is_open_the_shape_is_named_and_heads_are_asked_for():
    backbone = nn.Sequential(
        nn.Linear(8, 36), nn.Unflatten(1, (6, 6)), nn.Flatten(), nn.Linear(36, CLASSES)
    )
    with pytest.raises(ShapeError, match=r"after '1', of shape \(2, 6, 6\).*your own with 'heads'"):
        add_exits(backbone, at=["1"], num_classes=CLASSES, example=X)
    own = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES))
    network = add_exits(backbone, at=["1"], num_classes=CLASSES, example=X, heads=[own])
    assert network.exits[0] is own


def test_no_head_for_ids():
    backbone = nn.Sequential(nn.Identity(), nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, CLASSES))
    ids = torch.randint(9, (2, 2))
    with pytest.raises(ShapeError, match=r"after '0', of shape.*type torch.int64"):
        add_exits(backbone, at=["0"], num_classes=CLASSES, example=ids)
