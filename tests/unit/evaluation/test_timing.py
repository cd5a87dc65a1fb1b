import json

import pytest
import torch

from offramp.errors import InvalidArgumentError
from offramp.evaluation.stopwatch import representative_rows
from offramp.evaluation.timing import time_runner
from offramp.families.exits import AdaptiveRunner
from offramp.policy.confidence import max_probability_confidence
from offramp.policy.policies import ThresholdPolicy, never_leave
from offramp.zoo.mlp import mlp


@torch.no_grad()
def halving_policy(network, x) -> ThresholdPolicy:
    """The surer half leaves at each exit."""
    confidences = [max_probability_confidence(logits) for logits in network(x)[:-1]]
    thresholds = tuple(float(values.median()) for values in confidences)
    return ThresholdPolicy(thresholds, rule="max_probability")


@pytest.fixture(scope="module")
def timed():
    """A tiny network timed once for all tests below."""
    torch.manual_seed(0)
    network, x = mlp(in_features=6, widths=(5, 8, 7), num_classes=4), torch.randn(70, 6)
    runner = AdaptiveRunner(network, halving_policy(network, x))
    return runner, x, time_runner(runner, x, batch_sizes=(1, 32), rounds=2)


def test_timing_has_an_entry_for_each_batch_size(timed):
    _, _, timing = timed
    assert [row.batch_size for row in timing.results] == [1, 32]
    assert {row.backend for row in timing.results} == {"torch"}
    assert set(timing.stage_ms) == {1, 32}
    assert all(len(stages) == 3 and min(stages) > 0 for stages in timing.stage_ms.values())


def test_shares_and_macs_are_those_of_the_timed_samples(timed):
    runner, x, timing = timed
    result = runner.run(x)
    counts = torch.bincount(result.exit_index, minlength=3)
    assert counts.min() > 0
    assert timing.shares == pytest.approx((counts / 70).tolist())
    assert timing.mean_macs == pytest.approx(result.macs.double().mean().item())


def test_ratios_follow_from_the_milliseconds(timed):
    runner, x, timing = timed
    macs = runner.run(x).macs.double()
    # 64 batches of 1 at the most, two full ones of 32: of 70, all but some in the middle.
    mean = float(macs[representative_rows(macs.tolist(), 64)].mean())
    for row in timing.results:
        assert row.num_samples == 64
        assert row.ideal_speedup == pytest.approx(154 / mean)
        assert row.speedup == pytest.approx(row.plain_ms / row.adaptive_ms)
        assert row.realised == pytest.approx(row.speedup / row.ideal_speedup)
        assert row.stage_bound > 0
        assert min(row.all_exits_ms, row.never_exit_ms) > 0
        for name, (low, high) in row.interval_ms.items():
            assert low <= getattr(row, f"{name}_ms") <= high


def test_what_a_number_must_carry_is_there_and_json_can_hold_it(timed):
    _, _, timing = timed
    content = json.loads(json.dumps(timing.to_dict()))
    assert content["hardware"]
    assert content["threads"] == torch.get_num_threads()
    assert content["versions"]["torch"] == torch.__version__
    assert [row["batch_size"] for row in content["results"]] == [1, 32]


@pytest.mark.parametrize("batch_size", [0, -1, 8])
def test_batch_size_out_of_range_is_refused(network, batch_size):
    runner = AdaptiveRunner(network, never_leave(3))
    with pytest.raises(InvalidArgumentError, match=rf"int in \[1, 7\].* Got {batch_size}"):
        time_runner(runner, torch.randn(7, 6), batch_sizes=(1, batch_size))


def test_what_cannot_be_timed_is_refused(network):
    runner, x = AdaptiveRunner(network, never_leave(3)), torch.randn(7, 6)
    for arguments, options, said in (
        ((network, x), {}, "Expected a runner to time.* Got a MultiExitNetwork"),
        ((runner, (x, x)), {}, "samples in a tensor, without labels. Got a tuple"),
        ((runner, x[:0]), {}, "at least one sample to time"),
        ((runner, x), {"batch_sizes": 4}, "must hold ints, such as .* Got 4"),
    ):
        with pytest.raises(InvalidArgumentError, match=said):
            time_runner(*arguments, **options)


@pytest.mark.parametrize("rounds", [1, 0])
def test_too_few_rounds_are_refused(network, rounds):
    runner = AdaptiveRunner(network, never_leave(3))
    with pytest.raises(InvalidArgumentError, match=rf"'rounds'.* Got {rounds}"):
        time_runner(runner, torch.randn(7, 6), batch_sizes=(1,), rounds=rounds)


def test_table_names_the_samples_the_quartiles_and_what_they_are_of(timed):
    _, _, timing = timed
    lines = str(timing).splitlines()
    assert lines[0] == "milliseconds a batch, medians"
    assert lines[2].split() == [
        *("batch", "samples", "plain", "all", "exits", "adaptive", "never", "exit"),
        *("gain", "quartiles", "ideal"),
    ]
    assert [line.split()[:2] for line in lines[4:6]] == [["1", "64"], ["32", "64"]]
    assert max(map(len, lines)) <= 80
    for row in timing.results:
        first, third = row.speedup_interval
        assert first <= third
        assert (row.rounds, row.num_samples) == (2, 64)
    assert "stage_ms=None" not in repr(timing)


def test_one_sample_is_timed_by_itself(network):
    timing = time_runner(
        AdaptiveRunner(network, never_leave(3)), torch.randn(1, 6), batch_sizes=(1,)
    )
    assert timing.results[0].num_samples == 1
