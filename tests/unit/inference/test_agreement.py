from dataclasses import replace

import pytest
import torch

from offramp.errors import OfframpError
from offramp.inference.agreement import (
    all_exits_loop,
    check_early_answers,
    compare_with_all_exits,
    is_near,
)
from offramp.inference.runner import AdaptiveRunner
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy, always_leave_at, never_leave


@pytest.mark.parametrize(
    ("policy", "exits"),
    [
        (always_leave_at(0, num_exits=3), [0, 0, 0]),
        (always_leave_at(1, num_exits=3), [1, 1, 1]),
        (never_leave(3), [2, 2, 2]),
        (ThresholdPolicy((0.0, 0.0)), [0, 0, 0]),
    ],
)
def test_all_exits_loop_chooses_the_policys_exit(network, policy, exits):
    x = torch.randn(3, 6)
    output, exit_index, confidences = all_exits_loop(network, policy, x)
    assert exit_index.tolist() == exits
    assert torch.equal(output, network(x)[exits[0]])
    assert confidences.shape == (3, 3)


def test_all_exits_loop_keeps_the_state_of_every_sample(constant_network):
    network = constant_network([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [5.0, 0.0]])
    _, exit_index, _ = all_exits_loop(network, PatiencePolicy(2, 4), torch.zeros(2, 2))
    assert exit_index.tolist() == [2, 2]


def test_early_answers_that_agree_pass(network):
    x = torch.randn(300, 6)
    runner = AdaptiveRunner(network, ThresholdPolicy((0.03, 0.02)))
    result = runner.run(x)
    assert result.exit_index.unique().tolist() == [0, 1, 2]
    check_early_answers(result, runner, x)
    agreement = compare_with_all_exits(result, network, runner.policy, x)
    assert (agreement.num_samples, agreement.moved, agreement.moved_far) == (300, 0, 0)
    assert max(agreement.differences) < 1e-5


class Wrong(AdaptiveRunner):
    """Answers something else for the first ``count`` samples."""

    def __init__(self, network, *, field, count):
        super().__init__(network, never_leave(3))
        self.field, self.count = field, count

    def run(self, *inputs):
        result = super().run(*inputs)
        values = getattr(result, self.field).clone()
        values[: self.count] -= 1
        return replace(result, **{self.field: values})


@pytest.mark.parametrize(("field", "count"), [("output", 1), ("exit_index", 2), ("exit_index", 1)])
def test_wrong_early_answers_are_refused_before_the_clock_starts(network, field, count):
    # Nobody is near a threshold here: not even one in a thousand may leave elsewhere.
    runner, x = Wrong(network, field=field, count=count), torch.randn(1000, 6)
    result = runner.run(x)
    with pytest.raises(OfframpError, match="Nothing was timed"), torch.inference_mode():
        check_early_answers(result, runner, x)


def test_the_exit_that_differs_is_told(network):
    x, runner = torch.randn(50, 6), AdaptiveRunner(network, always_leave_at(1, num_exits=3))
    result = runner.run(x)
    off = replace(result, output=result.output + 0.25)
    agreement = compare_with_all_exits(off, network, runner.policy, x)
    assert agreement.differences == pytest.approx((0, 0.25, 0), abs=1e-5)
    assert agreement.differs
    assert not agreement.holds


def test_samples_near_a_threshold_by_hand():
    confidence_KB = torch.tensor([[0.5, 0.50005, 0.3, 0.8], [0.9, 0.1, 0.7, 0.1], [0.5] * 4])
    assert is_near(confidence_KB, (0.5, 0.69995)).tolist() == [True, True, True, False]
    assert is_near(confidence_KB, (float("inf"), 0.2)).tolist() == [False] * 4
    assert is_near(confidence_KB, ()).tolist() == [False] * 4
