import itertools
import math

import numpy as np
import pytest
import torch
from made_up_logits import TWO_COSTS, three_exits, two_exits
from torch import nn

from offramp.calibration.collect import ExitLogits
from offramp.calibration.evidence import calibrate
from offramp.calibration.frontier import frontier
from offramp.calibration.guarantee import calibrate_with_guarantee
from offramp.calibration.search import evaluate_thresholds, exits_left_by
from offramp.calibration.temperature import fit_temperatures
from offramp.errors import (
    DataError,
    FewSamplesWarning,
    InfeasibleTargetError,
    InvalidArgumentError,
)
from offramp.measure.exit_costs import ExitCosts
from offramp.policy.confidence import CONFIDENCE_RULES
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy

# Values worked out by hand have few samples.
pytestmark = pytest.mark.filterwarnings("ignore::offramp.errors.FewSamplesWarning")

INF, NAN = math.inf, math.nan
FOUR = two_exits((0.9, True, True), (0.6, False, True), (0.95, True, True), (0.8, False, True))
"""Let the surest 0 to 4 leave: accuracy 1, 1, 1, 3/4, 1/2; MACs 210, 192.5, 165, 137.5, 110."""


@pytest.mark.parametrize(
    ("max_drop", "threshold", "accuracy", "mean_macs"),
    [(0.0, 0.85, 1.0, 165), (0.24, 0.85, 1.0, 165), (0.25, 0.7, 0.75, 137.5), (0.5, 0, 0.5, 110)],
)
def test_spends_least_within_the_drop(max_drop, threshold, accuracy, mean_macs):
    found = calibrate(FOUR, max_drop=max_drop, rule="max_probability")
    assert found.policy.thresholds == pytest.approx((threshold,))
    assert found.policy.rule == "max_probability"
    assert (found.accuracy, found.mean_macs) == (accuracy, mean_macs)


@pytest.mark.parametrize(
    ("budget_macs", "threshold", "accuracy", "mean_macs"),
    [(1e9, 0.85, 1.0, 165), (164, 0.7, 0.75, 137.5), (137.5, 0.7, 0.75, 137.5), (110, 0, 0.5, 110)],
)
def test_is_most_accurate_within_the_budget(budget_macs, threshold, accuracy, mean_macs):
    found = calibrate(FOUR, budget_macs=budget_macs, rule="max_probability")
    assert found.policy.thresholds == pytest.approx((threshold,))
    assert (found.accuracy, found.mean_macs) == (accuracy, mean_macs)


def test_exit_that_only_harms_is_switched_off_and_its_head_not_paid_for():
    found = calibrate(two_exits((0.9, False, True), (0.8, False, True)), max_drop=0.0)
    assert found.policy.thresholds == (INF,)
    assert (found.accuracy, found.mean_macs) == (1.0, 210)


def test_samples_of_equal_confidence_leave_together():
    # The two at 0.8 cannot be told apart: either both leave, or only the first one does.
    tied = two_exits((0.9, True, True), (0.8, True, True), (0.8, False, True))
    found = calibrate(tied, max_drop=0.0, rule="max_probability")
    assert found.policy.thresholds == pytest.approx((0.85,))
    assert found.mean_macs == pytest.approx((110 + 2 * 220) / 3)


@pytest.mark.parametrize("rule", CONFIDENCE_RULES)
def test_nan_counts_as_staying(rule):
    found = calibrate(two_exits((NAN, True, True), (0.9, True, True)), max_drop=0.0, rule=rule)
    assert found.policy.thresholds == (0,)
    assert (found.accuracy, found.mean_macs) == (1.0, (110 + 220) / 2)


@pytest.mark.parametrize("budget_macs", [109, 0, -5, NAN])
def test_budget_below_the_cheapest_exit_says_what_it_costs(budget_macs):
    with pytest.raises(InfeasibleTargetError, match="at least 110") as caught:
        calibrate(FOUR, budget_macs=budget_macs)
    assert caught.value.best_achievable == 110


def test_a_policy_that_cannot_keep_to_a_target_leaves_it_to_those_that_can():
    never, sometimes = ThresholdPolicy((INF,)), ThresholdPolicy((INF,), rule="max_probability")
    nan_first = two_exits((NAN, True, True), (0.9, True, True))
    waits = PatiencePolicy(2, 2)  # nobody leaves at exit 0
    assert calibrate(FOUR, budget_macs=120, rule=lambda _: (waits, sometimes)).mean_macs <= 120
    with pytest.raises(InfeasibleTargetError) as caught:
        calibrate(nan_first, budget_macs=120, rule=lambda _: (waits, never))
    assert caught.value.best_achievable == 165


def test_no_samples_are_refused():
    with pytest.raises(DataError, match="at least one sample"):
        FOUR.take([])


def test_thresholds_are_compared_as_engines_compare_them():
    confidence_KN = np.array([[np.float32(0.9)], [1.0]], dtype=np.float64)
    assert float(np.float32(0.9)) < 0.9
    assert exits_left_by(confidence_KN, (0.9,)).tolist() == [0]


def test_cheapest_exit_may_be_one_behind_a_dear_head():
    # Exit 0 costs 1,010; exit 1 with exit 0 off 30; the final exit 80 at least.
    costs = ExitCosts(stage_macs=(10, 10, 50), head_macs=(1000, 10, 10))
    sure = torch.tensor([[5.0, 0.0]]).expand(3, 4, 2)
    logits = ExitLogits(logits_KNC=sure, labels_N=torch.zeros(4, dtype=torch.int64), costs=costs)
    found = calibrate(logits, budget_macs=30)
    assert found.policy.thresholds == (INF, 0)
    assert found.mean_macs == 30
    with pytest.raises(InfeasibleTargetError):
        calibrate(logits, budget_macs=29)


def test_budget_that_nan_puts_out_of_reach_is_refused():
    # The NaN sample goes on: at best (110 + 220) / 2, or everyone at 210.
    half_nan = two_exits((NAN, True, True), (0.9, True, True))
    with pytest.raises(InfeasibleTargetError) as caught:
        calibrate(half_nan, budget_macs=120)
    assert caught.value.best_achievable == 165


@pytest.mark.parametrize("targets", [{}, {"max_drop": 0.1, "budget_macs": 100}])
def test_exactly_one_target(targets):
    with pytest.raises(InvalidArgumentError, match="exactly one target"):
        calibrate(FOUR, **targets)


@pytest.mark.parametrize("given", [nn.Linear(2, 2), [FOUR]])
def test_what_was_not_collected_is_refused(given):
    said = r"as collect\(network, data\) returns them\. Got a (Linear|list)"
    for use in (
        lambda: calibrate(given, max_drop=0.1),
        lambda: calibrate_with_guarantee(given, max_risk=0.1),
        lambda: calibrate_with_guarantee(FOUR, max_risk=0.1, finding=given),
        lambda: fit_temperatures(given),
        lambda: frontier(None, given),
        lambda: frontier(given, FOUR),
    ):
        with pytest.raises(InvalidArgumentError, match=said):
            use()


@pytest.mark.parametrize(
    "target", [{"budget_macs": "1M"}, {"budget_share": "50%"}, {"max_risk": [0.1]}]
)
def test_targets_are_numbers(target):
    with pytest.raises(InvalidArgumentError, match=rf"'{next(iter(target))}' parameter must be a"):
        calibrate(FOUR, **target)


@pytest.mark.parametrize("max_drop", [-0.01, 1.0, NAN, "1%"])
def test_drop_out_of_range_is_refused(max_drop):
    with pytest.raises(InvalidArgumentError, match=r"in \[0, 1\)"):
        calibrate(FOUR, max_drop=max_drop)


def test_unknown_rule_is_refused():
    with pytest.raises(InvalidArgumentError, match="entropy, max_probability, margin"):
        calibrate(FOUR, max_drop=0.0, rule="gini")


def test_network_of_one_exit_needs_no_thresholds():
    costs = ExitCosts(stage_macs=(100,), head_macs=(10,))
    labels = torch.tensor([0, 1])
    logits = ExitLogits(logits_KNC=torch.eye(2)[None], labels_N=labels, costs=costs)
    found = calibrate(logits, max_drop=0.0)
    assert (found.policy.thresholds, found.accuracy, found.mean_macs) == ((), 1.0, 110)


# evaluate_thresholds


@pytest.mark.parametrize(
    ("thresholds", "accuracy", "mean_macs"),
    [
        ((0.5, 0.5), 3 / 4, (11 + 33 + 66 + 11) / 4),
        ((INF, 0.5), 2 / 4, (32 + 32 + 65 + 32) / 4),
        ((0.95, INF), 2 / 4, 64),
        ((0.0, 0.0), 1 / 4, 11),
        ((INF, INF), 2 / 4, 63),
    ],
)
def test_thresholds_by_hand(thresholds, accuracy, mean_macs):
    confidence = np.array([[0.9, 0.4, 0.1, 0.5], [0.6, 0.6, 0.3, 0.9], [0.0, 0.0, 0.0, 0.0]])
    correct = np.array(
        [[True, False, False, False], [False, True, False, False], [False, True, True, False]]
    )
    costs = ExitCosts(stage_macs=(10, 20, 30), head_macs=(1, 2, 3))
    found = evaluate_thresholds(confidence, correct, costs, thresholds)
    assert found == (accuracy, mean_macs)


# Against what is known or independently computed


def all_threshold_pairs(logits: ExitLogits, correct) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and mean MACs of every pair of thresholds that decides differently."""
    first, second, _ = (CONFIDENCE_RULES["entropy"](k).tolist() for k in logits.logits_KNC)
    (s0, s1, s2), (h0, h1, h2) = logits.costs.stage_macs, logits.costs.head_macs
    points = []
    for t0, t1 in itertools.product([*first, INF], [*second, INF]):
        hits = macs = 0
        for n in range(len(first)):
            k = 0 if first[n] >= t0 else 1 if second[n] >= t1 else 2
            hits += correct[k][n]
            macs += s0 + (h0 if t0 < INF else 0)
            if k > 0:
                macs += s1 + (h1 if t1 < INF else 0)
            if k > 1:
                macs += s2 + h2
        points.append((hits / len(first), macs / len(first)))
    accuracy, mean_macs = zip(*points, strict=True)
    return np.array(accuracy), np.array(mean_macs)


def test_expected_scores_has_each_exits_accuracy_as_its_mean():
    logits = three_exits(0, 24)
    worth = logits.expected_scores_KN
    np.testing.assert_allclose(worth.mean(1), logits.correct_KN.double().mean(1))
    agree = logits.logits_KNC[0].argmax(-1) == logits.logits_KNC[2].argmax(-1)
    likely, unlikely = worth[0][agree.numpy()], worth[0][~agree.numpy()]
    assert likely.mean() > unlikely.mean()
    # Right or wrong itself where the final exit is sure and right.
    np.testing.assert_allclose(FOUR.expected_scores_KN, FOUR.correct_KN.double(), atol=1e-12)


def test_expected_scores_is_right_or_wrong_where_the_final_exit_is_nan():
    logits = three_exits(1, 24)
    logits.logits_KNC[-1, 3] = NAN
    worth = logits.expected_scores_KN
    assert np.isfinite(worth).all()
    assert worth.mean(1) == pytest.approx(logits.correct_KN.double().mean(1).numpy())


def test_search_comes_near_the_best_of_all_threshold_pairs():
    excess_macs, lost_accuracy = [], []
    for seed in range(8):
        logits = three_exits(seed, 24)
        accuracy, macs = all_threshold_pairs(logits, logits.correct_KN.tolist())
        final = float(logits.correct_KN[-1].double().mean())
        for max_drop in (0.0, 0.1):
            found = calibrate(logits, max_drop=max_drop)
            assert found.accuracy >= final - max_drop - 1e-9
            best = macs[accuracy >= final - max_drop - 1e-9].min()
            excess_macs.append(found.mean_macs / best - 1)
        worth = logits.expected_scores_KN
        confidence = np.stack([CONFIDENCE_RULES["entropy"](k).numpy() for k in logits.logits_KNC])
        accuracy, macs = all_threshold_pairs(logits, worth.tolist())
        for budget in (150, 250, 350):
            found = calibrate(logits, budget_macs=budget)
            assert found.mean_macs <= budget
            best = accuracy[macs <= budget].max()
            reached = evaluate_thresholds(confidence, worth, logits.costs, found.policy.thresholds)
            lost_accuracy.append(best - reached[0])
    assert min(excess_macs) > -1e-9
    assert min(lost_accuracy) > -1e-9
    assert np.mean(excess_macs) < 0.01
    assert np.mean(lost_accuracy) < 0.005


def run_policy(logits: ExitLogits, policy) -> tuple[float, float]:
    """Accuracy and mean MACs when the policy itself decides, as it does in a runner."""
    num_exits, num_samples = logits.logits_KNC.shape[:2]
    off = frozenset(k for k in range(num_exits) if policy.is_off(k))
    leaves = [policy.step(k, logits.logits_KNC[k], ())[0].tolist() for k in range(num_exits)]
    exits = [next(k for k in range(num_exits) if leaves[k][n]) for n in range(num_samples)]
    hits = sum(bool(logits.correct_KN[k, n]) for n, k in enumerate(exits))
    exit_macs = logits.costs.exit_macs(off)
    return hits / num_samples, sum(exit_macs[k] for k in exits) / num_samples


@pytest.mark.parametrize("rule", CONFIDENCE_RULES)
@pytest.mark.parametrize("target", [{"max_drop": 0.05}, {"budget_macs": 250}])
def test_policy_does_what_calibration_says(rule, target):
    logits = three_exits(0, 500)
    found = calibrate(logits, rule=rule, **target)
    assert run_policy(logits, found.policy) == pytest.approx((found.accuracy, found.mean_macs))


def test_policy_does_what_calibration_says_where_confidences_are_neighbouring_floats():
    # Entropy so low that the confidences are 1 - j * 2**-24: no float lies between two of them.
    odds = torch.linspace(17, 16, 400)
    final = torch.tensor([9.0, 0.0]).expand(400, 2)
    for num_right in range(20, 400, 20):
        right = (torch.arange(400) < num_right)[:, None]
        first = torch.stack([odds, torch.zeros(400)], 1)
        first = torch.where(right, first, first.flip(1))
        labels = torch.zeros(400, dtype=torch.int64)
        logits = ExitLogits(
            logits_KNC=torch.stack([first, final]), labels_N=labels, costs=TWO_COSTS
        )
        found = calibrate(logits, max_drop=0.0)
        assert run_policy(logits, found.policy) == (found.accuracy, found.mean_macs)


# Few samples


def made_up(num_samples):
    """The first exit is right about all but a tenth, the final one about all."""
    labels = torch.arange(num_samples) % 2
    final = torch.nn.functional.one_hot(labels, 2) * 4.0
    first = torch.where((torch.arange(num_samples) % 10 == 0)[:, None], final.flip(1) / 8, final)
    costs = ExitCosts(stage_macs=(10, 20), head_macs=(1, 2))
    return ExitLogits(logits_KNC=torch.stack([first, final]), labels_N=labels, costs=costs)


@pytest.mark.parametrize("target", [{"max_drop": 0.01}, {"max_drop": 0.0}, {"budget_share": 0.9}])
def test_calibrate_warns_where_samples_cannot_tell(target):
    with pytest.warns(FewSamplesWarning, match=r"9 calibration samples .*calibrate_with_guarantee"):
        calibrate(made_up(9), **target)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("target", [{"max_drop": 0.01}, {"max_drop": 0.0}, {"budget_share": 0.9}])
def test_calibrate_says_nothing_of_enough_samples(target):
    calibrate(made_up(250), **target)


def test_calibration_prints_thresholds_shares_drop_and_samples():
    chosen = calibrate(made_up(250), max_drop=0.01)
    assert (chosen.num_samples, chosen.plain_macs) == (250, 32)
    assert [(row.index, row.share, row.macs) for row in chosen.exits] == [
        (0, pytest.approx(0.9), 11),
        (1, pytest.approx(0.1), 33),
    ]
    said = " ".join(str(chosen).split())
    assert said.startswith("thresholds of entropy, on 250 calibration samples exit threshold")
    assert "90.00 % 11 1 - 10.00 % 33" in said
    assert "accuracy 100.00 %, a drop of 0 points from 100.00 %" in said
    assert "a drop of at most 1 point of accuracy from the final exit, on 250 calib" in said
    assert "None" not in repr(chosen).replace("temperatures=None", "").replace("mean_iou=None", "")
    assert chosen.to_text("here").startswith("here, thresholds of entropy")
