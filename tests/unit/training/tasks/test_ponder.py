"""Ponder and prior losses against cases worked out by hand."""

import math

import pytest
import torch

from offramp.routing.halting import HaltingOutput
from offramp.training.tasks.ponder import depth_prior, ponder_loss, prior_loss


def output_of(weight_BTL, *, depth_BT, remainder_BT, valid_BT):
    weight_BTL = torch.tensor(weight_BTL)
    ponder_BT = torch.tensor(depth_BT) + torch.tensor(remainder_BT)
    runs_BTL = weight_BTL > 0
    valid_BT = torch.tensor(valid_BT)
    total_BTL = weight_BTL.cumsum(2)
    return HaltingOutput(torch.zeros(1, 2), weight_BTL, runs_BTL, ponder_BT, valid_BT, total_BTL)


TWO_TOKENS = output_of(
    [[[0.5, 0.25, 0.25], [0.75, 0.25, 0.0], [0.0, 0.0, 0.0]]],
    depth_BT=[[3, 2, 0]],
    remainder_BT=[[0.25, 0.25, 0.0]],
    valid_BT=[[True, True, False]],
)
"""Halted after three layers and after two; the third is padding."""


def test_pondering_is_layers_and_remainder_of_the_mean_token():
    assert float(ponder_loss(TWO_TOKENS)) == pytest.approx((3.25 + 2.25) / 2)


def test_the_prior_is_a_divergence_from_the_mean_distribution_over_all_layers():
    # The mean distribution is (0.625, 0.25, 0.125); the prior at depth 2 is normal.
    unscaled = [math.exp(-0.5), 1.0, math.exp(-0.5)]
    prior = [density / sum(unscaled) for density in unscaled]
    expected = sum(p * math.log(p / q) for p, q in zip(prior, (0.625, 0.25, 0.125), strict=True))
    assert float(prior_loss(TWO_TOKENS, 2.0)) == pytest.approx(expected)


def test_the_prior_costs_nothing_where_it_is_met():
    prior_L = depth_prior(4, 2.5, like=torch.zeros(()))
    met = output_of([[prior_L.tolist()]], depth_BT=[[4]], remainder_BT=[[0.1]], valid_BT=[[True]])
    assert float(prior_loss(met, 2.5)) == pytest.approx(0, abs=1e-6)


def test_the_prior_sums_to_one_over_all_layers():
    for target in (0.5, 4.0, 40.0):
        assert float(depth_prior(12, target, like=torch.zeros(())).sum()) == pytest.approx(1)


def test_the_prior_of_a_deep_network_is_finite_though_far_layers_have_none():
    weight = torch.full((1, 1, 32), 1 / 32)
    valid = torch.ones(1, 1).bool()
    output = HaltingOutput(torch.zeros(1, 2), weight, weight > 0, torch.ones(1, 1), valid, weight)
    prior = depth_prior(32, 16.0, like=weight)
    assert prior[0] == 0
    near = prior[8:24]
    expected = float((near * (near * 32).log()).sum())
    assert float(prior_loss(output, 16.0)) == pytest.approx(expected, abs=1e-5)


def test_a_layer_where_nobody_halts_is_dear_but_finite_and_pulls():
    weight = torch.tensor([[[1e-12, 1 - 1e-12]]], requires_grad=True)
    output = HaltingOutput(
        torch.zeros(1, 2), weight, weight > 0, torch.ones(1, 1), torch.ones(1, 1).bool(), weight
    )
    loss = prior_loss(output, 1.0)
    loss.backward()
    assert loss.isfinite()
    assert weight.grad[0, 0, 0] < -1e10  # relative to the weight itself: about the prior's share
