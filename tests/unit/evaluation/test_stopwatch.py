from itertools import pairwise

import pytest

from offramp.evaluation import stopwatch
from offramp.evaluation.stopwatch import LocalStopwatch, representative_rows, time_in_turn


class Clock:
    """Time that passes only where a contender says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(stopwatch.time, "perf_counter", made.perf_counter)
    return made


def slow(clock, seconds_a_batch, num_samples):
    """A stopwatch of two contenders, and how many batches each run had."""
    ran = []

    def contenders(size, count):
        def run():
            ran.append(count)
            clock.now += seconds_a_batch * count

        return {"plain": run, "adaptive": run}

    return LocalStopwatch(contenders, num_samples=num_samples), ran


@pytest.mark.parametrize(
    ("seconds", "size", "num_samples", "batches"),
    [
        (0.12, 1, 256, 64),  # 4 would fit in half a second
        (0.12, 1, 20, 20),
        (0.12, 32, 256, 4),
        (2.0, 32, 256, 2),
        (2.0, 256, 300, 1),
        (1e-5, 1, 256, 64),
        (2.0, 48, 70, 1),
    ],
)
def test_64_samples_are_timed_at_least(clock, seconds, size, num_samples, batches):
    watch, _ = slow(clock, seconds, num_samples)
    assert watch.prepare(size).num_batches == batches


def test_slow_networks_run_fewer_rounds_and_no_fewer_samples(clock):
    watch, ran = slow(clock, 0.5, 256)
    laps = time_in_turn({"torch": watch}, 1, 15, most_s=200)["torch"]
    assert laps.num_batches == 64
    assert {len(ms) for ms in laps.batch_ms.values()} == {3}  # of 64 seconds each
    assert ran.count(64) == 6
    assert laps.batch_ms["plain"] == pytest.approx([500.0] * 3)


def test_two_rounds_are_run_however_long_they_take(clock):
    watch, _ = slow(clock, 10, 256)
    laps = time_in_turn({"torch": watch}, 1, 15, most_s=1)["torch"]
    assert {len(ms) for ms in laps.batch_ms.values()} == {2}


def test_fast_networks_warm_up_and_run_all_rounds(clock):
    watch, ran = slow(clock, 1e-3, 256)
    laps = time_in_turn({"torch": watch}, 32, 5, most_s=60)["torch"]
    assert {len(ms) for ms in laps.batch_ms.values()} == {5}
    assert ran.count(8) == 2 * (2 + 5)


def test_chosen_samples_stand_for_all():
    costs = [1.0] * 8 + [0.0] * 248
    for count in (32, 64, 128, 256):
        rows = representative_rows(costs, count)
        assert sum(costs[row] for row in rows) == count / 32
        assert all(first < second for first, second in pairwise(rows))
    assert representative_rows(None, 3) == [0, 1, 2]
