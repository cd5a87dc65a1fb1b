import pytest
import torch

from offramp.errors import InvalidArgumentError
from offramp.recipes.exits import find_recipe
from offramp.zoo.segmentation import segmentation

X = torch.randn(2, 3, 36, 52)


@pytest.fixture
def network():
    return segmentation(num_classes=5, widths=(4, 6, 8), stages=3, head_width=8).eval()


def test_every_exit_says_a_class_for_cells_of_two_by_two_pixels(network):
    assert network.is_dense
    assert [tuple(output.shape) for output in network(X)] == [(2, 5, 18, 26)] * 3


def test_fewer_exits_are_the_last_ones_on_the_same_stages(network):
    plain = segmentation(num_classes=5, widths=(4, 6, 8), stages=3, head_width=8, num_exits=1)
    assert plain.costs(X).plain_macs == network.costs(X).plain_macs
    assert plain.num_exits == 1


def test_the_recipes_heads_are_cheap():
    costs = find_recipe("camvid-seg").build_network().costs(torch.zeros(1, 3, 180, 240))
    assert sum(costs.head_macs[:-1]) <= 0.15 * costs.plain_macs
    assert 0.5e9 <= costs.plain_macs <= 1.0e9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": 0}, "at least one stage"),
        ({"widths": ()}, "at least one stage"),
        ({"num_exits": 4}, r"must be an int in \[1, 3\]"),
    ],
)
def test_impossible_networks_are_refused(options, words):
    with pytest.raises(InvalidArgumentError, match=words):
        segmentation(**{"num_classes": 5, "stages": 3} | options)
