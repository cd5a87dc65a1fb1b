"""A sweep over thresholds against the gated sum at each of them."""

from itertools import pairwise

import pytest
import torch

from offramp.errors import DataError, InvalidArgumentError
from offramp.evaluation.sweeping import collect_sweep
from offramp.families.halting import HALTING
from offramp.families.skip import SKIP
from offramp.routing.skip import at_threshold


@pytest.fixture
def batches():
    images, labels = torch.randn(9, 3, 16, 16), torch.arange(9) % 5
    return list(zip(images.split(4), labels.split(4), strict=True))


def test_every_threshold_says_and_costs_what_the_gated_sum_does(skip_network, batches):
    images = torch.cat([batch for batch, _ in batches])
    costs = skip_network.costs(images)
    with torch.no_grad():
        middle = float(skip_network(images).probability.median()) + 1e-3
    found = collect_sweep(skip_network, batches, [middle, 1.0])
    assert found.thresholds == (1.0, middle, 0.0)  # running everything is always among them
    assert found.labels_N.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert found.plain_macs == costs.plain_macs
    for k, threshold in enumerate(found.thresholds):
        with torch.no_grad():
            expected = skip_network(images, at_threshold(threshold))
        torch.testing.assert_close(found.logits_KNC[k], expected.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.macs_KN[k], costs.macs(expected.action.bool()))
    assert found.mean_macs_K[0] < found.mean_macs_K[1] < found.mean_macs_K[2]


def test_thresholds_are_few_even_in_score_and_include_both_ends(skip_network, batches):
    found = collect_sweep(skip_network, batches[:1])
    assert found.thresholds == SKIP.thresholds
    assert (len(found.thresholds), found.thresholds[0], found.thresholds[-1]) == (21, 1, 0)
    assert 0.5 in found.thresholds  # at which gates are trained
    scores = torch.logit(torch.tensor(SKIP.thresholds[-2:0:-1], dtype=torch.float64))
    steps = [float(after - before) for before, after in pairwise(scores)]
    assert steps == pytest.approx([2 / 3] * 18)


@pytest.fixture
def small_batches():
    images, labels = torch.randn(9, 3, 12, 12), torch.arange(9) % 5
    return list(zip(images.split(4), labels.split(4), strict=True))


def test_every_threshold_says_and_costs_what_the_masked_pass_does(halting_network, small_batches):
    images = torch.cat([batch for batch, _ in small_batches])
    costs = halting_network.costs(images)
    found = collect_sweep(halting_network, small_batches, [0.8, 0.4])
    assert found.thresholds == (0.4, 0.8, 1.0)  # where tokens stay longest is always among them
    assert found.labels_N.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert found.plain_macs == costs.plain_macs
    for k, threshold in enumerate(found.thresholds):
        with torch.no_grad():
            expected = halting_network(images, threshold=threshold)
        torch.testing.assert_close(found.logits_KNC[k], expected.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.macs_KN[k], costs.macs(expected.tokens))
    assert found.mean_macs_K[0] < found.mean_macs_K[1] < found.mean_macs_K[2]


def test_thresholds_of_tokens_are_as_many_and_hold_that_of_training(halting_network, small_batches):
    found = collect_sweep(halting_network, small_batches[:1])
    assert found.thresholds == HALTING.thresholds
    assert (len(found.thresholds), found.thresholds[-1]) == (21, 1.0)
    assert 0.99 in found.thresholds
    assert list(found.thresholds) == sorted(set(found.thresholds))
    assert all(before <= after for before, after in pairwise(found.mean_macs_K))


def test_wrong_input_is_refused(skip_network, batches):
    with pytest.raises(DataError, match="at least one sample"):
        collect_sweep(skip_network, [])
    with pytest.raises(InvalidArgumentError, match=r"in \[0, 1\]"):
        collect_sweep(skip_network, batches, [1.5])


def test_a_network_of_exits_is_refused(network):
    with pytest.raises(InvalidArgumentError, match="one threshold steers"):
        collect_sweep(network, [(torch.randn(3, 6), torch.arange(3))])
