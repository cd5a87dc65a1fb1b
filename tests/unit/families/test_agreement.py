from dataclasses import replace

import pytest
import torch

from offramp.errors import OfframpError
from offramp.families import check_agreement, reference_of
from offramp.families.agreement import answer_in_batches
from offramp.families.exits import AdaptiveRunner, all_exits_loop
from offramp.families.halting import token_reference
from offramp.measure.agreement import Reference, compare, is_near
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy, always_leave_at, never_leave
from offramp.results import AdaptiveResult


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
        check_agreement(result, runner, x)


def test_the_exit_that_differs_is_told(network):
    x, runner = torch.randn(50, 6), AdaptiveRunner(network, always_leave_at(1, num_exits=3))
    result = runner.run(x)
    off = replace(result, output=result.output + 0.25)
    agreement = compare(off, reference_of(network, runner.policy, x))
    assert agreement.differences == pytest.approx((0, 0.25, 0), abs=1e-5)
    assert agreement.differs
    assert not agreement.holds


def test_samples_near_a_threshold_by_hand():
    confidence_KB = torch.tensor([[0.5, 0.50005, 0.3, 0.8], [0.9, 0.1, 0.7, 0.1], [0.5] * 4])
    assert is_near(confidence_KB, (0.5, 0.69995)).tolist() == [[True], [True], [True], [False]]
    assert is_near(confidence_KB, (float("inf"), 0.2)).tolist() == [[False]] * 4
    assert is_near(confidence_KB, ()).tolist() == [[False]] * 4


# Blocks that are skipped


def test_answers_of_runs_without_blocks_have_none(network):
    runner = AdaptiveRunner(network, never_leave(3))
    assert answer_in_batches(runner, torch.randn(3, 6), batch_size=2).blocks is None


def blocks_compared(blocks, near):
    """One sample, two classes, three gates; all blocks ran where they were masked afterwards."""
    result = AdaptiveResult(
        output=torch.zeros(1, 2),
        exit_index=torch.zeros(1, dtype=torch.int64),
        confidence=torch.zeros(1),
        macs=torch.zeros(1, dtype=torch.int64),
        blocks=torch.tensor([blocks]),
    )
    every = torch.ones(1, 3, dtype=torch.bool)
    reference = Reference(
        output=torch.zeros(1, 2),
        exit_index=torch.zeros(1, dtype=torch.int64),
        num_exits=1,
        work=every,
        is_near=lambda: torch.tensor([near]),
    )
    return compare(result, reference)


@pytest.mark.parametrize(
    ("blocks", "near", "moved", "moved_far"),
    [
        ([True, True, True], [False, False, False], 0, 0),
        ([True, False, False], [False, True, False], 1, 0),
        ([True, False, False], [True, False, True], 1, 1),  # near, but not where the ways part
        ([False, True, True], [True, False, False], 1, 0),
    ],
)
def test_rounding_excuses_other_blocks_only_where_the_ways_part(blocks, near, moved, moved_far):
    agreement = blocks_compared(blocks, near)
    assert (agreement.moved, agreement.moved_far) == (moved, moved_far)
    assert agreement.holds == (moved_far == 0)


# Tokens that are dropped


def tokens_compared(tokens, near, first_layers=None):
    """One sample, two classes, four layers, ten tokens of which one halts behind each layer."""
    result = AdaptiveResult(
        output=torch.zeros(1, 2),
        exit_index=torch.zeros(1, dtype=torch.int64),
        confidence=torch.zeros(1),
        macs=torch.zeros(1, dtype=torch.int64),
        tokens=torch.tensor([tokens]),
    )
    reference = token_reference(
        torch.zeros(1, 2),
        torch.tensor([[10, 9, 8, 7]]),
        lambda: torch.tensor([near]),
        first_layers,
    )
    return compare(result, reference)


NEVER, AT_0, AT_1, AT_2 = (
    [False] * 4,
    *([layer == at for layer in range(4)] for at in range(3)),
)


@pytest.mark.parametrize(
    ("tokens", "near", "moved", "moved_far"),
    [
        ([10, 9, 8, 7], NEVER, 0, 0),
        ([10, 9, 7, 7], NEVER, 1, 1),
        ([10, 9, 7, 7], AT_1, 1, 0),
        ([10, 9, 7, 6], AT_1, 1, 0),
        ([10, 9, 7, 7], AT_2, 1, 1),  # near, but behind where the ways part
        ([10, 9, 7, 7], AT_0, 1, 1),
        ([9, 9, 8, 7], AT_0, 1, 1),  # everything runs the first layer
    ],
)
def test_rounding_excuses_other_tokens_only_where_the_ways_part(tokens, near, moved, moved_far):
    agreement = tokens_compared(tokens, near)
    assert (agreement.moved, agreement.moved_far) == (moved, moved_far)
    assert agreement.holds == (moved_far == 0)


@pytest.mark.parametrize(
    ("tokens", "near", "moved", "moved_far"),
    [
        ([10, 10, 8, 8], NEVER, 0, 0),  # within a step all run on
        ([10, 10, 9, 9], AT_0, 1, 0),
        ([10, 10, 9, 9], AT_1, 1, 0),
        ([10, 10, 9, 9], AT_2, 1, 1),
    ],
)
def test_tokens_are_compared_where_they_are_dropped(tokens, near, moved, moved_far):
    agreement = tokens_compared(tokens, near, first_layers=(0, 2))
    assert (agreement.moved, agreement.moved_far) == (moved, moved_far)
