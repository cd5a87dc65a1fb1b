"""Choosing one threshold from a few that ran: by hand, and against a sequence of tests run here."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom

from offramp.calibration.risk import RISKS, betting_p_value, trinomial_p_value
from offramp.calibration.sequence import in_random_order, part_samples
from offramp.calibration.sweep import (
    Sweep,
    choose_threshold,
    choose_threshold_with_guarantee,
)
from offramp.errors import DataError, InfeasibleTargetError, InvalidArgumentError, ShapeError

# Values worked out by hand have few samples.
pytestmark = pytest.mark.filterwarnings("ignore::offramp.errors.FewSamplesWarning")


def sweep_that_predicts(predictions_KN, labels_N, thresholds, macs_K, **rest):
    """At each threshold every sample costs as much; the plain network 100."""
    logits = torch.nn.functional.one_hot(torch.as_tensor(predictions_KN), 2).float()
    macs_KN = torch.tensor(macs_K)[:, None].expand(logits.shape[:2])
    return Sweep(
        logits_KNC=logits,
        labels_N=torch.as_tensor(labels_N),
        thresholds=thresholds,
        macs_KN=macs_KN,
        plain_macs=100,
        **rest,
    )


SWEEP = sweep_that_predicts(
    [
        [0, 0, 0, 0, 0, 1],  # right about 4 of 6, differs from the last on 3
        [0, 0, 0, 1, 0, 1],  # right about 5, differs on 2
        [0, 0, 0, 1, 1, 0],  # right about 5
    ],
    labels_N=[0, 0, 0, 1, 1, 1],
    thresholds=(0.8, 0.5, 0.0),
    macs_K=[50, 80, 110],
)
"""Three thresholds; with everything run it costs 110, gates counted."""


def test_accuracy_and_cost_by_hand():
    assert SWEEP.accuracy_K.tolist() == pytest.approx([4 / 6, 5 / 6, 5 / 6])
    assert SWEEP.mean_macs_K.tolist() == [50, 80, 110]
    uneven = replace(SWEEP, macs_KN=torch.arange(18).reshape(3, 6))
    assert uneven.mean_macs_K.tolist() == [2.5, 8.5, 14.5]


@pytest.mark.parametrize(
    ("target", "threshold"),
    [
        ({"max_drop": 0.0}, 0.5),  # as accurate as with everything run, and cheaper
        ({"max_drop": 0.16}, 0.5),
        ({"max_drop": 0.17}, 0.8),  # loses 1 of 6
        ({"max_risk": 0.33, "risk": "disagreement"}, 0.0),
        ({"max_risk": 0.34, "risk": "disagreement"}, 0.5),
        ({"max_risk": 0.5, "risk": "disagreement"}, 0.8),
        ({"max_risk": 0.2, "risk": "error"}, 0.5),
        ({"budget_macs": 50}, 0.8),
        ({"budget_macs": 79.9}, 0.8),
        ({"budget_macs": 1000}, 0.5),  # no dearer one is more accurate
        ({"budget_share": 0.5}, 0.8),
        ({"budget_share": 0.8}, 0.5),
    ],
)
def test_threshold_by_hand(target, threshold):
    chosen = choose_threshold(SWEEP, **target)
    k = SWEEP.thresholds.index(threshold)
    assert chosen.threshold == threshold
    assert chosen.accuracy == SWEEP.accuracy_K[k]
    assert chosen.mean_macs == SWEEP.mean_macs_K[k]
    assert chosen.guarantee is None


def test_samples_weigh_as_their_classes_do():
    # Class 0 is all right at every threshold: only a third of class 1, of weight 0.1, is lost.
    weighted = replace(SWEEP, prior=(0.9, 0.1))
    assert weighted.accuracy_K.tolist() == pytest.approx([0.9 + 0.1 / 3, *(0.9 + 0.2 / 3,) * 2])
    assert choose_threshold(weighted, max_drop=0.04).threshold == 0.8
    assert choose_threshold(weighted, max_drop=0.03).threshold == 0.5


def test_budget_below_the_cheapest_names_it():
    with pytest.raises(InfeasibleTargetError, match="at least 50, the cheapest there is") as caught:
        choose_threshold(SWEEP, budget_macs=49)
    assert caught.value.best_achievable == 50


def test_risk_below_the_lowest_names_it():
    with pytest.raises(InfeasibleTargetError, match=r"0\.1667, the lowest of any thr") as caught:
        choose_threshold(SWEEP, max_risk=0.1, risk="error")
    assert caught.value.best_achievable == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "exactly one target"),
        ({"max_drop": 0.1, "budget_share": 0.5}, "exactly one target"),
        ({"max_drop": 1.0}, "'max_drop' parameter must be a fraction"),
        ({"max_risk": -0.1}, "'max_risk' parameter must be a fraction"),
        ({"max_risk": 0.1, "risk": "ruin"}, "must be one of .* Got 'ruin'"),
        ({"budget_macs": float("inf")}, "'budget_macs' parameter must be finite"),
        ({"budget_share": 0.0}, "'budget_share' parameter"),
    ],
)
def test_targets_are_checked_as_those_of_exits_are(target, message):
    with pytest.raises(InvalidArgumentError, match=message):
        choose_threshold(SWEEP, **target)


@pytest.mark.parametrize("field", ["logits_KNC", "macs_KN"])
def test_other_numbers_of_thresholds_are_refused(field):
    with pytest.raises(ShapeError, match="3 thresholds and 6 labels"):
        replace(SWEEP, **{field: getattr(SWEEP, field)[:2]})


def test_logits_of_exits_are_no_sweep():
    for choose in (
        lambda: choose_threshold([SWEEP], max_drop=0.1),
        lambda: choose_threshold_with_guarantee([SWEEP], max_risk=0.1),
    ):
        with pytest.raises(InvalidArgumentError, match=r"as collect_sweep\(.*Got list"):
            choose()


def test_samples_are_taken_with_what_they_cost():
    sweep = replace(SWEEP, macs_KN=torch.arange(18).reshape(3, 6))
    taken = sweep.take([5, 1])
    assert taken.labels_N.tolist() == [1, 0]
    assert taken.macs_KN.tolist() == [[5, 1], [11, 7], [17, 13]]
    assert torch.equal(taken.logits_KNC, sweep.logits_KNC[:, [5, 1]])
    with pytest.raises(DataError, match="every class"):
        replace(sweep, prior=(0.5, 0.5)).take([0])


# A promise


def with_differences(counts, num_samples=200, **rest):
    """All right with everything run; at threshold k the first ``counts[k]`` answers are wrong."""
    predictions = [[int(n < count) for n in range(num_samples)] for count in (*counts, 0)]
    thresholds = tuple(np.linspace(0.9, 0, len(predictions)).tolist())
    macs = list(range(10, 10 * len(predictions) + 1, 10))
    labels = [0] * num_samples
    return sweep_that_predicts(predictions, labels, thresholds, macs, **rest)


def test_exact_binomial_by_hand():
    # From the safe end: 0, 2, 8, then 40 wrong of 200; 1 wrong behind that is no longer tested.
    sweep = with_differences([1, 40, 8, 2])
    p_values = [binom.cdf(count, 200, 0.1) for count in (0, 2, 8, 40)]
    assert [p <= 0.05 for p in p_values] == [True, True, True, False]
    chosen = choose_threshold_with_guarantee(
        sweep, max_risk=0.1, risk="disagreement", guarantee=0.95
    )
    assert chosen.threshold == sweep.thresholds[2]
    assert (chosen.accuracy, chosen.mean_macs) == (0.96, 30)
    promise = chosen.guarantee
    assert promise.method == "exact binomial"
    assert promise.value == pytest.approx(p_values[2])
    assert (promise.num_samples, promise.num_tested) == (200, 200)  # all of them test
    assert (promise.num_candidates, promise.num_passed) == (5, 3)
    assert promise.probability == 0.95


def test_exact_trinomial_equals_a_sequence_run_here():
    sweep = with_differences([90, 30, 12, 6, 3], num_samples=600)
    passed = 0
    for k in reversed(range(6)):
        value = trinomial_p_value(1.0 - sweep.correct_KN[k].numpy(), 0.05, delta=0.1)
        if value > 0.1:
            break
        passed, last = passed + 1, value
    chosen = choose_threshold_with_guarantee(sweep, max_risk=0.05, guarantee=0.9, seed=7)
    assert chosen.threshold == sweep.thresholds[-passed]
    assert chosen.guarantee.method == "exact trinomial"
    assert chosen.guarantee.value == pytest.approx(last)
    promise = chosen.guarantee
    assert (promise.num_tested, promise.num_samples, promise.num_finding) == (600, 600, 0)


@pytest.mark.parametrize("is_parted", [True, False])
def test_betting_equals_a_sequence_run_here(is_parted):
    sweep, elsewhere = (with_differences([n, 30, 12, 6, 3], num_samples=600) for n in (90, 91))
    elsewhere = replace(elsewhere, logits_KNC=2 * elsewhere.logits_KNC)
    if is_parted:
        finding, testing = part_samples(sweep, 7)
    else:
        finding, testing = elsewhere, sweep.take(in_random_order(sweep, 7))
    found_KN, tested_KN = (RISKS["brier_gap"].losses(each) for each in (finding, testing))
    passed = 0
    for found_N, tested_N in zip(found_KN[::-1], tested_KN[::-1], strict=True):
        value = betting_p_value(tested_N, 0.05, delta=0.1, before=found_N)
        if value > 0.1:
            break
        passed, last = passed + 1, value
    chosen = choose_threshold_with_guarantee(
        sweep,
        max_risk=0.05,
        risk="brier_gap",
        guarantee=0.9,
        seed=7,
        finding=None if is_parted else elsewhere,
    )
    assert chosen.threshold == sweep.thresholds[-passed]
    assert chosen.guarantee.method == "betting"
    assert chosen.guarantee.value == pytest.approx(last)
    promise = chosen.guarantee
    counts = (420, 600, 180) if is_parted else (600, 600, 600)
    assert (promise.num_tested, promise.num_samples, promise.num_finding) == counts


def test_finding_must_be_of_the_same_thresholds_and_other_samples():
    sweep = with_differences([5], num_samples=200)
    spread = replace(sweep, logits_KNC=sweep.logits_KNC * torch.arange(1, 201)[:, None])
    with pytest.raises(DataError, match="not among those that test"):
        choose_threshold_with_guarantee(spread, max_risk=0.1, finding=spread.take(range(50)))
    other = replace(sweep, thresholds=tuple(0.9 * t for t in sweep.thresholds))
    with pytest.raises(InvalidArgumentError, match="at the thresholds"):
        choose_threshold_with_guarantee(sweep, max_risk=0.1, finding=other)


def test_promise_on_average_counts_every_sample_at_its_worst():
    # Other samples are wrong at each threshold: their worst grows by 1, 3, 6 of 100.
    predictions = torch.zeros(4, 100, dtype=torch.int64)
    for k, start, stop in ((2, 0, 1), (1, 1, 4), (0, 4, 10)):
        predictions[k, start:stop] = 1
    sweep = sweep_that_predicts(predictions, [0] * 100, (0.9, 0.6, 0.3, 0.0), [10, 20, 30, 40])
    chosen = choose_threshold_with_guarantee(sweep, max_risk=0.06, guarantee="mean")
    # (100 * 0.04 + 1) / 101 is within 0.06; (100 * 0.10 + 1) / 101 is not, though 0.06 alone is.
    assert chosen.threshold == 0.6
    assert chosen.guarantee.probability is None
    assert chosen.guarantee.value == pytest.approx(5 / 101 - 0.06)


def test_too_few_samples_say_how_many_would_do():
    sweep = with_differences([5], num_samples=20)
    with pytest.raises(InfeasibleTargetError, match="20 calibration samples cannot") as caught:
        choose_threshold_with_guarantee(sweep, max_risk=0.1, risk="disagreement")
    # Without a loss, n samples show a risk below 0.1 if 0.9 ** n is at most 0.05: 29.
    assert "about 29 would do" in str(caught.value)
    assert caught.value.best_achievable == pytest.approx(1 - 0.05 ** (1 / 20), abs=1e-4)


def test_promise_is_kept():
    rng = np.random.default_rng(0)
    true_risks = (0.3, 0.15, 0.11, 0.08, 0.0)
    thresholds = (0.9, 0.7, 0.5, 0.3, 0.0)
    violations = 0
    for _ in range(200):
        luck_N = rng.random(250)
        predictions = [(luck_N < risk).astype(int) for risk in true_risks]
        sweep = sweep_that_predicts(np.stack(predictions), [0] * 250, thresholds, [1, 2, 3, 4, 5])
        chosen = choose_threshold_with_guarantee(
            sweep, max_risk=0.1, risk="disagreement", guarantee=0.9
        )
        violations += true_risks[thresholds.index(chosen.threshold)] > 0.1
    assert binom.sf(violations - 1, 200, 0.1) > 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_risk": 0.0}, "above 0"),
        ({"max_risk": 0.1, "guarantee": 1.0}, "probability in"),
        ({"max_risk": 0.1, "risk": "ruin"}, "Got 'ruin'"),
    ],
)
def test_promises_are_checked_as_those_of_exits_are(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        choose_threshold_with_guarantee(SWEEP, **options)


def test_sentence_names_what_answers_and_what_it_is_compared_with():
    sweep = with_differences([1])
    promise = choose_threshold_with_guarantee(sweep, max_risk=0.05).guarantee
    sentence = promise.sentence("made up", way="skipping", last="the whole network")
    assert "skipping loses at most 5 percentage points" in sentence
    assert "against the whole network on new samples" in sentence
    assert "early exit loses" in promise.sentence("made up")
