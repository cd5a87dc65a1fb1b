import pytest
import torch

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.model.heads import (
    MixedPool2d,
    conv_head,
    grid_head,
    head_for,
    linear_head,
    pooled_head,
    token_head,
)


@pytest.mark.parametrize(
    ("features", "axis", "as_vector"),
    [
        pytest.param(torch.randn(2, 5), 1, lambda x: x, id="flat"),
        pytest.param(torch.randn(2, 7, 5), 2, lambda x: x.sum(1) / 7, id="tokens"),
        pytest.param(torch.randn(2, 5, 7), 1, lambda x: x.sum(2) / 7, id="signal"),
        pytest.param(torch.randn(2, 5, 4, 3), 1, lambda x: x.sum((2, 3)) / 12, id="pixels"),
        pytest.param(torch.randn(2, 4, 3, 5), 3, lambda x: x.sum((1, 2)) / 12, id="channels last"),
        pytest.param(torch.randn(2, 5, 2, 3, 4), 1, lambda x: x.sum((2, 3, 4)) / 24, id="video"),
    ],
)
def test_head_for_features_is_linear_in_their_mean(features, axis, as_vector):
    head = head_for(features, num_classes=3, axis=axis)
    linear = list(head.modules())[-1]
    expected = as_vector(features) @ linear.weight.T + linear.bias
    torch.testing.assert_close(head(features), expected)


@pytest.mark.parametrize(("shape", "axis"), [((2,), 1), ((2, 3, 4), 0), ((2, 3, 4), 3)])
def test_features_without_such_an_axis(shape, axis):
    with pytest.raises(ShapeError, match=rf"'axis' parameter .* Got {axis}"):
        head_for(torch.zeros(shape), num_classes=3, axis=axis)


def test_grid_head_keeps_positions_that_pooling_forgets():
    left, right = torch.zeros(1, 1, 7, 7), torch.zeros(1, 1, 7, 7)
    left[..., 3, 0], right[..., 3, 6] = 1, 1
    pooled, grid = pooled_head(1, 2), grid_head(1, 7, 2)
    torch.testing.assert_close(pooled(left), pooled(right))
    assert not torch.allclose(grid(left), grid(right))


@pytest.mark.parametrize(("side", "cells"), [(3, 1), (4, 1), (5, 2), (7, 3), (14, 6)])
def test_grid_head_has_a_weight_for_each_window(side, cells):
    head = grid_head(4, side, 10)
    assert head(torch.zeros(2, 4, side, side)).shape == (2, 10)
    assert head[-1].in_features == 4 * cells * cells


def test_linear_and_token_heads_have_the_asked_shapes():
    assert linear_head(5, 3)(torch.zeros(2, 5)).shape == (2, 3)
    assert token_head(5, 3)(torch.zeros(2, 9, 5)).shape == (2, 3)


def test_mixed_pool_starts_with_half_of_each_and_learns_the_mix():
    maps = torch.tensor([[[[0.0, 2.0], [4.0, 10.0]]]])  # average 4, maximum 10
    pool = MixedPool2d()
    assert pool(maps).tolist() == [[7.0]]
    pool.mix.data.fill_(20.0)
    assert pool(maps).item() == pytest.approx(10.0)
    pool(maps).sum().backward()
    assert pool.mix.grad is not None


def test_conv_head_halves_the_map_and_doubles_the_channels():
    head = conv_head(4, 3).eval()
    x = torch.randn(2, 4, 7, 7)
    assert head(x).shape == (2, 3)
    assert head[:2](x).shape == (2, 8, 4, 4)


def test_token_head_leaves_padding_out_of_the_mean():
    head = token_head(2, 3)
    tokens = torch.randn(2, 4, 2)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    torch.testing.assert_close(head(tokens, mask)[1:], head(tokens[1:, :2]))
    torch.testing.assert_close(head(tokens, mask)[:1], head(tokens[:1]))
    assert head(tokens, torch.zeros(2, 4)).isfinite().all()


def test_token_head_on_the_first_token():
    head = token_head(2, 3, pool="first")
    tokens = torch.randn(2, 4, 2)
    torch.testing.assert_close(head(tokens, torch.ones(2, 4)), head.classify(tokens[:, 0]))
    with pytest.raises(InvalidArgumentError, match=r"mean, first or last\. Got 'max'"):
        token_head(2, 3, pool="max")


def test_token_head_on_the_last_token_that_is_no_padding():
    head = token_head(2, 3, pool="last")
    tokens, mask = torch.randn(2, 4, 2), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    expected = head.classify(tokens[torch.arange(2), torch.tensor([1, 3])])
    torch.testing.assert_close(head(tokens, mask), expected)
    torch.testing.assert_close(head(tokens), head.classify(tokens[:, -1]))
