import time

import pytest
import torch
from torch import nn

from offramp import AdaptiveRunner, InvalidArgumentError, MultiExitNetwork, ThresholdPolicy
from offramp.runtime.deadline import Deadline

INF = float("inf")
STAGE_S = 0.02
X = torch.randn(5, 4)


class Clock:
    """Stands still but for what is said to take time."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class Slow(nn.Linear):
    """A stage that takes a known time."""

    def __init__(self, clock):
        super().__init__(4, 4)
        self.clock = clock

    def forward(self, x):
        self.clock.now += STAGE_S
        return super().forward(x)


@pytest.fixture
def runner(clock):
    heads = [nn.Linear(4, 3) for _ in range(4)]
    network = MultiExitNetwork([Slow(clock) for _ in range(4)], heads)
    return AdaptiveRunner(network, ThresholdPolicy((1.0, INF, 1.0)))


def test_steps_are_timed_up_to_the_exits_that_are_on(runner):
    step_ms = runner.time_steps(X)
    assert runner.step_ms == step_ms
    runner.network.train()
    runner.time_steps(X)
    assert not runner.network.training  # or timing would move its BatchNorm
    assert step_ms == pytest.approx((20, 40, 20))  # two stages to the exit after that which is off


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize(
    ("deadline_ms", "exit_index", "taken_ms"),
    [(1, 0, 20), (59, 0, 20), (61, 2, 60), (79, 2, 60), (81, 3, 80)],
)
def test_a_step_that_would_end_late_is_not_started(
    runner, clock, samples, deadline_ms, exit_index, taken_ms
):
    runner.time_steps(X[:samples])
    inputs = X[:samples]
    expected = runner.network(inputs)[exit_index]
    runner.run(inputs)  # counts the MACs, which takes stages too
    start = clock.now
    result = runner.run(inputs, deadline_ms=deadline_ms)
    assert 1e3 * (clock.now - start) == pytest.approx(taken_ms)
    assert result.exit_index.tolist() == [exit_index] * samples
    torch.testing.assert_close(result.output, expected)
    macs = runner.network.costs(inputs).exit_macs(frozenset({1}))
    assert result.macs.tolist() == [macs[exit_index]] * samples


def test_who_left_before_keeps_that_answer(runner):
    runner.step_ms = (20.0, 40.0, 1e6)
    confidence = runner.run(X, deadline_ms=1).confidence
    middle = float(confidence.sort().values[2:4].mean())
    early = AdaptiveRunner(runner.network, ThresholdPolicy((middle, INF, 1.0)))
    early.step_ms = runner.step_ms
    expected = [0 if sure >= middle else 2 for sure in confidence.tolist()]
    assert early.run(X, deadline_ms=1e3).exit_index.tolist() == expected


@pytest.mark.parametrize("deadline_ms", [0, -1, float("nan")])
def test_a_deadline_is_above_zero(runner, deadline_ms):
    runner.step_ms = (1.0, 1.0, 1.0)
    with pytest.raises(InvalidArgumentError, match="must be a number above 0"):
        runner.run(X, deadline_ms=deadline_ms)


def test_steps_must_have_been_timed(runner):
    with pytest.raises(InvalidArgumentError, match="call time_steps"):
        runner.run(X, deadline_ms=5)


@pytest.mark.usefixtures("clock")
def test_a_longer_step_is_refused_where_a_shorter_one_is_not():
    deadline = Deadline(30, (10.0, 10.0, 20.0, 40.0))
    allowed = [deadline.allows(step) for step in range(4)]
    assert allowed == [True, True, True, False]
