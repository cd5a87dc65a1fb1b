"""Three exits on eight samples: exits 0 and 1 are sure, and right, about half of them."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from made_up_logits import three_exits

from offramp.calibration.collect import ExitLogits
from offramp.calibration.evidence import calibrate
from offramp.calibration.latency import calibrate_for_latency, calibrate_to_milliseconds
from offramp.errors import InfeasibleTargetError, InvalidArgumentError, ShapeError
from offramp.measure.exit_costs import ExitCosts
from offramp.measure.profile import Profile
from offramp.policy.policies import PatiencePolicy

# Values worked out by hand have few samples.
pytestmark = pytest.mark.filterwarnings("ignore::offramp.errors.FewSamplesWarning")

LABELS = torch.zeros(8, dtype=torch.int64)


@pytest.fixture
def logits():
    """Exit 0 is sure of four samples, exit 1 of six; both are wrong where they are unsure."""
    sure, unsure = torch.tensor([6.0, 0.0]), torch.tensor([0.0, 0.1])
    rows = [torch.stack([sure if n < number else unsure for n in range(8)]) for number in (4, 6, 8)]
    costs = ExitCosts(stage_macs=(100, 100, 100), head_macs=(1, 1, 1))
    return ExitLogits(logits_KNC=torch.stack(rows), labels_N=LABELS, costs=costs)


def profile(exit_ms, *, compaction_ms=0.0):
    """One millisecond a stage and batch of 8, growing evenly; exits as given at that size."""
    return Profile(
        backend="torch",
        versions={"torch": "2"},
        hardware="a processor",
        threads=1,
        sizes=(1, 8),
        stage_ms=((0.125, 1.0),) * 3,
        exit_ms=tuple((ms, ms) for ms in exit_ms),
        compaction_ms=((compaction_ms,) * 2, (compaction_ms,) * 2, (0.0, 0.0)),
    )


def choose(logits, times, batch_size=8):
    return calibrate_for_latency(logits, times, batch_size=batch_size, max_drop=0.0)


def test_exits_that_pay_stay_on(logits):
    found = choose(logits, profile((0.01, 0.01, 0.01)))
    assert found.switched_off == ()
    assert found.chosen == calibrate(logits, max_drop=0.0)
    # 8, 4 and 2 samples reach the stages.
    assert found.batch_ms == pytest.approx(1 + 0.5 + 0.25 + 0.03)
    assert found.plain_ms == pytest.approx(3 + 0.01)


def test_an_exit_that_takes_more_than_it_saves_goes(logits):
    found = choose(logits, profile((0.01, 0.3, 0.01)))
    (gone,) = found.switched_off
    assert gone.exit_index == 1
    assert gone.asking_ms == pytest.approx(0.3)
    # Without exit 1, the four samples that exit 0 leaves go to the end.
    assert gone.ms_with == pytest.approx(1 + 0.5 + 0.25 + 0.32)
    assert gone.ms_without == found.batch_ms == pytest.approx(1 + 0.5 + 0.5 + 0.02)
    assert found.chosen.policy.thresholds[1] == math.inf
    assert found.chosen.accuracy == 1.0


def test_compaction_counts_as_much_as_the_head(logits):
    found = choose(logits, profile((0.01, 0.01, 0.01), compaction_ms=0.29))
    assert [gone.exit_index for gone in found.switched_off] == [1]
    assert found.switched_off[0].asking_ms == pytest.approx(0.3)


def test_where_no_exit_pays_the_plain_network_is_left(logits):
    found = choose(logits, profile((2.0, 2.0, 0.1)))
    assert found.chosen.policy.thresholds == (math.inf, math.inf)
    assert {gone.exit_index for gone in found.switched_off} == {0, 1}
    assert found.batch_ms == found.plain_ms == pytest.approx(3.1)


def test_a_single_sample_is_expected_to_take_its_share_of_the_stages(logits):
    found = choose(logits, profile((0.01, 0.01, 0.01)), batch_size=1)
    stages = 0.125 * (1 + 0.5 + 0.25)
    assert found.batch_ms == pytest.approx(stages + 0.01 * (1 + 0.5 + 0.25))


def test_what_does_not_fit_is_refused(logits):
    times = profile((0.1, 0.1, 0.1))
    with pytest.raises(InvalidArgumentError, match=r"in \[1, 8\].* Got 9"):
        choose(logits, times, batch_size=9)
    with pytest.raises(ShapeError, match=r"profile of 3 stages. Got one of 2"):
        choose(logits, replace(times, stage_ms=times.stage_ms[:2]))


def test_exits_can_be_kept_off(logits):
    chosen = calibrate(logits, max_drop=0.0, off=frozenset({0}))
    assert chosen.policy.thresholds[0] == math.inf
    assert chosen.policy.thresholds[1] < 1
    assert calibrate(logits, budget_macs=290, off=frozenset({0})).policy.is_off(0)


@pytest.mark.parametrize("off", [{2}, {-1}, {0, 7}])
def test_only_exits_that_there_are_can_be_kept_off(logits, off):
    with pytest.raises(InvalidArgumentError, match=r"exits in \[0, 1\], the final one never"):
        calibrate(logits, max_drop=0.0, off=frozenset(off))


# A budget in milliseconds


def three_even_exits() -> ExitLogits:
    costs = ExitCosts(stage_macs=(100,) * 3, head_macs=(1,) * 3)
    return three_exits(0, 1500, signal=(1.5, 2.5, 4.0), noise=1.0, costs=costs)


UNEVEN = replace(
    profile((0.05, 0.05, 0.05), compaction_ms=0.02),
    # The first sample takes half of what eight take.
    stage_ms=((0.5, 1.0),) * 3,
)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_budget_from_the_fastest_on_is_kept(batch_size):
    answers = three_even_exits()

    def within(budget_ms):
        return calibrate_to_milliseconds(
            answers, UNEVEN, budget_ms=budget_ms, batch_size=batch_size
        )

    with pytest.raises(InfeasibleTargetError, match="'budget_ms' parameter must be at") as caught:
        within(1e-6)
    fastest_ms = caught.value.best_achievable
    plain_ms = UNEVEN.batch_ms([batch_size] * 3, off=(0, 1)) / batch_size
    assert 0 < fastest_ms < plain_ms / 2
    accuracies = []
    for share in (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0):
        budget_ms = fastest_ms + share * (plain_ms - fastest_ms) + 1e-9
        found = within(budget_ms)
        assert found.batch_ms / batch_size <= budget_ms
        accuracies.append(found.chosen.accuracy)
    assert accuracies[0] < accuracies[3] < accuracies[-1]
    falls = [before - after for before, after in itertools.pairwise(accuracies)]
    assert max(falls) < 0.01


def test_a_large_budget_is_no_error():
    found = calibrate_to_milliseconds(three_even_exits(), UNEVEN, budget_ms=1e60, batch_size=8)
    assert found.chosen.accuracy >= float(three_even_exits().correct_KN[-1].double().mean()) - 0.005


def test_an_exit_that_takes_too_long_is_off():
    slow = replace(UNEVEN, exit_ms=((5.0, 5.0), (0.05, 0.05), (0.05, 0.05)))
    found = calibrate_to_milliseconds(three_even_exits(), slow, budget_ms=0.3, batch_size=8)
    assert found.chosen.policy.is_off(0)


@pytest.mark.parametrize("budget_ms", [0.0, -1.0, math.inf, math.nan])
def test_budget_out_of_range_is_refused(budget_ms):
    with pytest.raises(InvalidArgumentError, match="'budget_ms'"):
        calibrate_to_milliseconds(three_even_exits(), UNEVEN, budget_ms=budget_ms, batch_size=8)


def test_policy_that_needs_every_exit_keeps_all_or_loses_all():
    answers = three_even_exits()
    for exit_ms, is_off in (((0.01,) * 3, [False, False]), ((9.0,) * 3, [True, True])):
        found = calibrate_for_latency(
            answers, profile(exit_ms), batch_size=8, max_drop=0.05, rule=PatiencePolicy(2, 3)
        )
        policy = found.chosen.policy
        assert [policy.is_off(k) for k in range(2)] == is_off
