import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up_logits import three_exits, two_exits

from offramp.calibration.collect import ExitLogits
from offramp.calibration.evidence import calibrate
from offramp.calibration.frontier import frontier
from offramp.calibration.sweep import Sweep
from offramp.errors import InvalidArgumentError, ShapeError
from offramp.measure.exit_costs import ExitCosts
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy, always_leave_at

# Values worked out by hand have few samples.
pytestmark = pytest.mark.filterwarnings("ignore::offramp.errors.FewSamplesWarning")

INF, NAN = math.inf, math.nan
CALIBRATION = two_exits(
    (0.9, True, True), (0.6, False, True), (0.95, True, True), (0.8, False, True)
)
"""Let the surest 0 to 4 leave: accuracy 1, 1, 1, 3/4, 1/2; MACs 210, 192.5, 165, 137.5, 110."""

TEST = two_exits((0.9, True, True), (0.75, True, False), (0.8, False, False), (0.6, False, True))
"""Thresholds 0, 0.7, 0.85: accuracy 1/2, 3/4, 1/2; MACs 110, 137.5, 192.5."""


def one_exit() -> ExitLogits:
    costs = ExitCosts(stage_macs=(100,), head_macs=(10,))
    logits = torch.tensor([[[2.0, 0.0]] * 4])
    return ExitLogits(logits_KNC=logits, labels_N=torch.tensor([0, 0, 0, 1]), costs=costs)


# By hand


def test_thresholds_are_chosen_on_calibration_data_and_judged_on_test():
    found = frontier(CALIBRATION, TEST, num_points=3, rule="max_probability")
    assert found.plain_macs == 210
    assert [point.budget_macs for point in found.points] == pytest.approx(
        [110, (110 * 210) ** 0.5, 210]
    )
    for point, threshold in zip(found.points, (0, 0.7, 0.85), strict=True):
        assert point.thresholds == pytest.approx((threshold,))
    assert [point.calibration_accuracy for point in found.points] == [1 / 2, 3 / 4, 1]
    assert [point.accuracy for point in found.points] == [1 / 2, 3 / 4, 1 / 2]
    assert [point.mean_macs for point in found.points] == [110, 137.5, 192.5]


def test_area_is_under_steps_that_the_test_data_does_not_choose():
    found = frontier(CALIBRATION, TEST, num_points=3, rule="max_probability")
    # From 192.5 on stands the point that calibration prefers, though another did better on test.
    expected = (27.5 * 1 / 2 + 55 * 3 / 4 + 17.5 * 1 / 2) / 100
    assert found.area == pytest.approx(expected)


def test_points_that_cost_more_than_the_plain_network_do_not_count_in_the_area():
    # Nobody on test is sure enough for 0.7 or 0.85: everybody pays both heads, 220.
    unsure = two_exits((0.6, False, True), (0.55, True, True))
    found = frontier(CALIBRATION, unsure, num_points=3, rule="max_probability")
    assert [point.mean_macs for point in found.points] == [110, 220, 220]
    assert found.area == 1 / 2


def test_equal_thresholds_appear_once_with_the_least_budget():
    found = frontier(CALIBRATION, TEST, num_points=21, rule="max_probability")
    # 137.5 and 165 are what letting the surest three and two leave costs; more buys nothing.
    budgets = np.geomspace(110, 210, 21)
    least = [110, budgets[budgets >= 137.5][0], budgets[budgets >= 165][0]]
    assert [point.budget_macs for point in found.points] == pytest.approx(least)
    assert len({point.thresholds for point in found.points}) == 3


def test_each_exit_alone_runs_no_head_before_it():
    found = frontier(CALIBRATION, TEST)
    assert [(e.index, e.accuracy, e.macs) for e in found.exits] == [(0, 0.5, 110), (1, 0.5, 210)]


@pytest.mark.parametrize("calibration", [None, one_exit()])
def test_network_of_one_exit_is_one_point(calibration):
    found = frontier(calibration, one_exit())
    (point,) = found.points
    assert (point.thresholds, point.accuracy, point.mean_macs) == ((), 3 / 4, 110)
    assert (point.budget_macs, found.area) == (110, 3 / 4)
    assert point.calibration_accuracy == (None if calibration is None else 3 / 4)


# On random answers


def test_points_keep_their_budgets_on_calibration_data_and_are_what_the_policy_reaches():
    calibration, test = three_exits(0, 200), three_exits(1, 200)
    found = frontier(calibration, test, num_points=6)
    assert len(found.points) > 3
    assert found.points[0].budget_macs == 120
    for point in found.points:
        there, here = (
            logits.measure(ThresholdPolicy(point.thresholds)) for logits in (calibration, test)
        )
        assert there.mean_macs <= point.budget_macs
        assert there.accuracy == point.calibration_accuracy
        assert (here.accuracy, here.mean_macs) == (point.accuracy, point.mean_macs)


def test_area_agrees_with_a_fine_sum():
    falls = 0
    for seed in range(4):
        found = frontier(three_exits(seed, 200), three_exits(seed + 50, 200), num_points=8)
        points = sorted(found.points, key=lambda point: point.mean_macs)
        on_calibration = [point.calibration_accuracy for point in points]
        falls += on_calibration != sorted(on_calibration)
        heights = [
            max(
                (point for point in points if point.mean_macs <= macs),
                key=lambda point: point.calibration_accuracy,
            ).accuracy
            for macs in np.linspace(points[0].mean_macs, found.plain_macs, 4001)
        ]
        assert found.area == pytest.approx(np.mean(heights), abs=2e-4)
    assert falls  # somewhere a dearer point is worse on the calibration data


def test_exits_alone_are_what_always_leaving_there_reaches():
    test = three_exits(1, 200)
    for alone in frontier(three_exits(0, 200), test, num_points=2).exits:
        reached = test.measure(always_leave_at(alone.index, num_exits=3))
        assert (reached.accuracy, reached.mean_macs) == (alone.accuracy, alone.macs)


def test_is_the_same_again():
    assert frontier(three_exits(0, 200), three_exits(1, 200)) == frontier(
        three_exits(0, 200), three_exits(1, 200)
    )


def test_rounding_of_weighted_costs_does_not_move_the_cheap_end():
    # With this prior, everybody leaving at exit 0 costs 120.00000000000003 on average.
    prior = (0.22, 0.14, 0.2, 0.44)
    calibration = replace(three_exits(0, 60), prior=prior)
    assert calibrate(calibration, budget_macs=120).mean_macs == pytest.approx(120)
    found = frontier(calibration, replace(three_exits(1, 200), prior=prior), num_points=3)
    assert found.points[0].budget_macs == 120
    assert found.points[0].mean_macs == pytest.approx(120)


def test_starts_at_what_a_sample_that_may_not_leave_costs():
    calibration = two_exits((NAN, True, True), (0.9, True, True))
    found = frontier(calibration, TEST, rule="max_probability")
    # One of two leaves at exit 0.
    assert found.points[0].budget_macs == (110 + 220) / 2


def test_a_policy_that_waits_starts_where_it_may_leave():
    policy = PatiencePolicy(2, 3)
    found = frontier(three_exits(0, 200), three_exits(1, 200), rule=policy, num_points=4)
    # Nobody may leave at exit 0, so everybody pays its head and two stages at least.
    assert found.points[0].budget_macs > 120 + 155
    for point in found.points:
        there = three_exits(0, 200).measure(policy.with_thresholds(point.thresholds))
        assert there.mean_macs <= point.budget_macs * (1 + 1e-9)


def test_json_has_null_for_an_exit_that_is_off():
    harmful = two_exits((0.9, False, True), (0.8, False, True))
    content = frontier(harmful, TEST, num_points=2).to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content.keys() == {"plain_macs", "area", "points", "exits"}
    assert content["points"][-1]["thresholds"] == [None]
    assert content["exits"][0] == {"index": 0, "accuracy": 0.5, "macs": 110}


# Wrong input


def test_logits_of_other_networks_are_refused():
    dearer = replace(TEST, costs=ExitCosts(stage_macs=(100, 200), head_macs=(10, 10)))
    with pytest.raises(InvalidArgumentError, match=r"same network.*\(110, 220\).*\(110, 320\)"):
        frontier(CALIBRATION, dearer)
    with pytest.raises(InvalidArgumentError, match=r"same network.*\(0, 1\).*\(0, 3\)"):
        frontier(CALIBRATION, replace(TEST, numbers=(0, 3)))
    with pytest.raises(ShapeError, match="2 exits and 2 classes against 3 and 4"):
        frontier(CALIBRATION, three_exits(0, 200))
    with pytest.raises(ShapeError, match="2 exits and 2 classes against 2 and 1"):
        frontier(CALIBRATION, replace(TEST, logits_KNC=TEST.logits_KNC[..., :1]))


def test_samples_of_unequal_length_may_cost_otherwise_on_average():
    longer = ExitCosts(stage_macs=(200, 200), head_macs=(20, 20))
    ragged, test = replace(CALIBRATION, is_ragged=True), replace(TEST, is_ragged=True)
    found = frontier(ragged, replace(test, costs=longer), num_points=4)
    assert [p.thresholds for p in found.points] == [
        p.thresholds for p in frontier(ragged, test, num_points=4).points
    ]
    assert found.plain_macs == 420
    assert found.points[0].mean_macs == 2 * 110
    sweep, other = (replace(each, is_ragged=True) for each in (SWEPT, SWEPT_TEST))
    assert frontier(sweep, replace(other, plain_macs=120)).plain_macs == 120


def test_several_exits_need_calibration_data():
    with pytest.raises(InvalidArgumentError, match=r"'calibration'.*2 exits"):
        frontier(None, TEST)


@pytest.mark.parametrize("num_points", [-1, 0, 1, 1001])
def test_number_of_points_out_of_range_is_refused(num_points):
    with pytest.raises(InvalidArgumentError, match=rf"'num_points'.*\[2, 1000\].*{num_points}"):
        frontier(CALIBRATION, TEST, num_points=num_points)


@pytest.mark.parametrize("rule", ["gini", PatiencePolicy(2, 4)])
def test_rule_that_does_not_fit_is_refused(rule):
    with pytest.raises(InvalidArgumentError):
        frontier(CALIBRATION, TEST, rule=rule)


# One threshold that steers the whole network


def sweep_of(correct_KN, thresholds=(0.9, 0.5, 0.0), macs_K=(40, 60, 110)) -> Sweep:
    """Every sample is of class 0 and costs as much; the plain network 100."""
    logits = torch.nn.functional.one_hot(1 - torch.tensor(correct_KN), 2).float()
    return Sweep(
        logits_KNC=logits,
        labels_N=torch.zeros(logits.shape[1], dtype=torch.int64),
        thresholds=thresholds,
        macs_KN=torch.tensor(macs_K)[:, None].expand(logits.shape[:2]),
        plain_macs=100,
    )


SWEPT = sweep_of([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
SWEPT_TEST = sweep_of([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])


def test_threshold_of_gates_is_chosen_on_calibration_data_and_judged_on_test():
    found = frontier(SWEPT, SWEPT_TEST, num_points=3)
    # Budgets 40, 63.2 and 100: the last two buy the same, and everything run costs too much.
    assert [point.budget_macs for point in found.points] == pytest.approx([40, 4000**0.5])
    assert [point.thresholds for point in found.points] == [(0.9,), (0.5,)]
    assert [point.calibration_accuracy for point in found.points] == [1 / 4, 3 / 4]
    assert [point.accuracy for point in found.points] == [1 / 2, 1]
    assert [point.mean_macs for point in found.points] == [40, 60]
    assert [(e.index, e.accuracy, e.macs) for e in found.exits] == [(0, 3 / 4, 100)]
    assert found.area == pytest.approx((20 * 1 / 2 + 40 * 1) / 60)
    assert json.loads(json.dumps(found.to_dict()))["points"][0]["thresholds"] == [0.9]


def test_gates_that_cost_more_than_they_save_are_one_point():
    dear = sweep_of([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], macs_K=(105, 108, 110))
    found = frontier(dear, dear, num_points=4)
    assert [point.mean_macs for point in found.points] == [105]
    assert found.area == 1 / 4


@pytest.mark.parametrize("change", [{"thresholds": (0.9, 0.4, 0.0)}, {"plain_macs": 99}])
def test_sweeps_of_other_thresholds_or_networks_are_refused(change):
    with pytest.raises(InvalidArgumentError, match="at the same thresholds"):
        frontier(SWEPT, replace(SWEPT_TEST, **change))
