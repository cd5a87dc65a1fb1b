import math

import pytest
import torch
from torch import nn

from offramp.calibration.collect import ExitLogits, collect, read_logits, write_logits
from offramp.errors import DataError, ShapeError
from offramp.measure.exit_costs import ExitCosts
from offramp.model.multi_exit import MultiExitNetwork

COSTS = ExitCosts(stage_macs=(10, 20), head_macs=(1, 2))


def test_logits_of_all_batches_in_order(network):
    x, labels = torch.randn(7, 6), torch.arange(7) % 4
    found = collect(network, zip(x.split(3), labels.split(3), strict=True))
    torch.testing.assert_close(found.logits_KNC, torch.stack(network(x)))
    assert found.labels_N.tolist() == labels.tolist()
    assert found.costs == network.costs(x)


def test_network_is_evaluated_and_its_mode_restored():
    stage = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3))
    network = MultiExitNetwork([stage], [nn.Linear(3, 2)]).train()
    batch = (torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))
    first, second = collect(network, [batch]), collect(network, [batch])
    assert torch.equal(first.logits_KNC, second.logits_KNC)
    assert network.training
    assert stage[1].num_batches_tracked == 0


def test_of_a_network_that_skips_blocks_the_only_exit_is_collected(skip_network):
    images, labels = torch.randn(5, 3, 16, 16), torch.arange(5)
    skip_network.train()
    found = collect(skip_network, zip(images.split(2), labels.split(2), strict=True))
    assert skip_network.training
    skip_network.eval()
    torch.testing.assert_close(found.logits_KNC, skip_network.plain()(images)[None].detach())
    assert found.labels_N.tolist() == labels.tolist()
    assert found.costs.plain_macs == skip_network.costs(images).plain_macs
    assert found.costs.exit_macs() == (found.costs.plain_macs,)  # no gate is asked


def test_of_a_network_whose_tokens_halt_they_stay_as_long_as_they_can(halting_network):
    images, labels = torch.randn(5, 3, 12, 12), torch.arange(5)
    found = collect(halting_network, zip(images.split(2), labels.split(2), strict=True))
    with torch.no_grad():
        expected = halting_network(images, threshold=1.0).logits
    torch.testing.assert_close(found.logits_KNC, expected[None])
    assert found.labels_N.tolist() == labels.tolist()
    assert found.costs.exit_macs() == (halting_network.costs(images).plain_macs,)


def test_empty_loader_is_refused(network):
    with pytest.raises(DataError, match="at least one sample"):
        collect(network, [])


def test_correct_by_hand():
    logits = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    found = ExitLogits(logits_KNC=logits, labels_N=torch.tensor([0, 1]), costs=COSTS)
    assert found.correct_KN.tolist() == [[True, False], [True, True]]


def test_exits_are_numbered_from_zero_unless_told():
    given = {"logits_KNC": torch.zeros(2, 1, 3), "labels_N": torch.zeros(1), "costs": COSTS}
    assert ExitLogits(**given).numbers == (0, 1)
    assert ExitLogits(**given, numbers=(1, 3)).numbers == (1, 3)
    with pytest.raises(ShapeError, match=r"2 numbers, one per exit. Got \(1, 2, 3\)"):
        ExitLogits(**given, numbers=(1, 2, 3))


@pytest.mark.parametrize("shape", [(2, 4, 3), (3, 5, 3), (2, 5), (2,)])
def test_logits_of_another_shape_are_refused(shape):
    labels = torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"K = 2 exits and N = 5 labels"):
        ExitLogits(logits_KNC=torch.zeros(shape), labels_N=labels, costs=COSTS)


def test_logits_that_half_precision_does_not_hold_stay_finite(tmp_path):
    logits_KNC = torch.tensor([[[1e5, -1e5, 0.0], [math.inf, 1.0, 2.0]]])
    costs = ExitCosts(stage_macs=(1,), head_macs=(1,))
    labels_N = torch.tensor([0, 1])
    write_logits(tmp_path / "x", ExitLogits(logits_KNC=logits_KNC, labels_N=labels_N, costs=costs))
    kept = read_logits(tmp_path / "x").logits_KNC
    assert kept.tolist() == [[[65504.0, -65504.0, 0.0], [math.inf, 1.0, 2.0]]]
