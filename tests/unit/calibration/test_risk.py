import math
from functools import partial

import numpy as np
import pytest
import torch
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from scipy.stats import binom, multinomial

from offramp.calibration.collect import ExitLogits
from offramp.calibration.risk import (
    RISKS,
    betting_p_value,
    binomial_p_value,
    cautious_losses,
    check_risk,
    fixed_bet_p_value,
    hoeffding_bentkus_p_value,
    trinomial_p_value,
)
from offramp.errors import InvalidArgumentError
from offramp.measure.exit_costs import ExitCosts

NAN = math.nan
DELTA = 0.1
BEFORE = np.array([0.0, 1.0] * 10)
BETS = {
    "betting": partial(betting_p_value, delta=DELTA, before=BEFORE),
    "fixed bet": partial(fixed_bet_p_value, delta=DELTA, before=BEFORE),
}
P_VALUES = {
    "binomial": binomial_p_value,
    "hoeffding-bentkus": hoeffding_bentkus_p_value,
    **BETS,
}


def losses(num_lost: int, num_samples: int) -> np.ndarray:
    return np.repeat([1.0, 0.0], [num_lost, num_samples - num_lost])


# Losses of exits

ANSWERS = ExitLogits(
    logits_KNC=torch.tensor(
        [
            [[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]],
            [[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]],
        ]
    ),
    labels_N=torch.tensor([0, 1, 0, 1]),
    costs=ExitCosts(stage_macs=(1, 1), head_macs=(0, 0)),
)
"""Both right; only the final exit right; both wrong; only the first exit right."""


@pytest.mark.parametrize(
    ("risk", "first", "final"),
    [
        ("accuracy_gap", [0, 1, 0, -1], [0, 0, 0, 0]),
        ("disagreement", [0, 1, 0, 1], [0, 0, 0, 0]),
        ("error", [0, 1, 1, 0], [0, 0, 1, 1]),
    ],
)
def test_losses_by_hand(risk, first, final):
    np.testing.assert_array_equal(RISKS[risk].losses(ANSWERS), [first, final])


def test_brier_gap_is_half_the_difference_of_squared_distances():
    p = 1 / (1 + math.exp(-2))
    sure_and_right, sure_and_wrong = (1 - p) ** 2, p**2
    expected = sure_and_wrong - sure_and_right
    found = RISKS["brier_gap"].losses(ANSWERS)
    np.testing.assert_allclose(found, [[0, expected, 0, -expected], [0] * 4], atol=1e-12)
    assert np.abs(found).max() <= 1


def test_brier_gap_counts_nan_as_the_worst():
    logits = ANSWERS.logits_KNC.clone()
    logits[0, 0] = NAN
    broken = ExitLogits(logits_KNC=logits, labels_N=ANSWERS.labels_N, costs=ANSWERS.costs)
    p = 1 / (1 + math.exp(-2))
    assert RISKS["brier_gap"].losses(broken)[0, 0] == pytest.approx(1 - (1 - p) ** 2)


@pytest.mark.parametrize("risk", RISKS)
def test_no_loss_is_above_one_and_the_kinds_are_as_declared(risk):
    generator = torch.Generator().manual_seed(0)
    logits = ExitLogits(
        logits_KNC=9 * torch.randn(3, 200, 4, generator=generator),
        labels_N=torch.randint(0, 4, (200,), generator=generator),
        costs=ExitCosts(stage_macs=(1, 1, 1), head_macs=(0, 0, 0)),
    )
    found = RISKS[risk].losses(logits)
    assert found.max() <= 1
    assert set(np.unique(found)) <= {0, 1} or not RISKS[risk].is_binary


@pytest.mark.parametrize(
    ("risk", "words"),
    [
        ("accuracy_gap", "skipping loses at most 1.5 percentage points of accuracy against all"),
        ("disagreement", "at most 1.5 % of the answers differ from all's"),
        ("error", "at most 1.5 % of the answers are wrong"),
        ("brier_gap", "skipping's Brier score (in [0, 1]) is at most 0.015 above all's"),
    ],
)
def test_promises_say_their_target_and_what_is_compared(risk, words):
    assert RISKS[risk].in_words(0.015, "skipping", "all") == words


@pytest.mark.parametrize(("risk", "target"), [("gap", 0.1), ("error", 1.0), ("error", NAN)])
def test_unknown_risks_and_targets_out_of_range_are_refused(risk, target):
    with pytest.raises(InvalidArgumentError):
        check_risk(risk, target)


# P-values against what is known


@pytest.mark.parametrize("num_samples", [1, 50, 2000])
@pytest.mark.parametrize("target", [0.005, 0.1, 0.5])
def test_hoeffding_bentkus_equals_mapie(num_samples, target):
    for num_lost in sorted({0, 1, num_samples // 20, num_samples // 3, num_samples}):
        sample = losses(num_lost, num_samples)
        theirs = compute_hoeffding_bentkus_p_value(
            np.array([sample.mean()]), num_samples, np.array([target])
        )
        # A mean of one takes the logarithm of 0 there.
        expected = 1.0 if num_lost == num_samples else min(1.0, float(theirs[0, 0]))
        assert hoeffding_bentkus_p_value(sample, target) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("target", [0.01, 0.2])
def test_binomial_equals_mapies_for_binary_losses(target):
    for num_lost in (0, 1, 4, 30):
        sample = losses(num_lost, 400)
        theirs = compute_hoeffding_bentkus_p_value(
            np.array([sample.mean()]), 400, np.array([target]), binary=True
        )
        assert binomial_p_value(sample, target) == pytest.approx(float(theirs[0, 0]), abs=1e-12)


def test_binomial_is_the_chance_of_so_few():
    # Of three samples, none lost at a risk of one half: one in eight.
    assert binomial_p_value(losses(0, 3), 0.5) == pytest.approx(1 / 8)
    assert binomial_p_value(losses(1, 3), 0.5) == pytest.approx(4 / 8)


def test_hoeffding_bentkus_takes_fractions():
    assert hoeffding_bentkus_p_value(np.full(100, 0.25), 0.5) == pytest.approx(
        min(
            math.exp(-100 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))),
            math.e * float(binom.cdf(25, 100, 0.5)),
        )
    )


def test_fixed_bet_by_hand():
    # Variance 1/4; the stake is the square root of 2 log(1/delta) over (n times variance).
    stake = math.sqrt(2 * math.log(10) / (100 * 0.25))
    sample = losses(5, 100)
    gained = 95 * math.log1p(stake * 0.2) + 5 * math.log1p(stake * (0.2 - 1))
    found = fixed_bet_p_value(sample, 0.2, delta=0.1, before=BEFORE)
    assert found == pytest.approx(math.exp(-gained))


def test_betting_takes_the_best_moment():
    lucky_first = np.concatenate([np.zeros(300), np.ones(20)])
    unlucky_first = lucky_first[::-1]
    p_lucky, p_unlucky = (BETS["betting"](x, 0.1) for x in (lucky_first, unlucky_first))
    assert p_lucky < p_unlucky / 100
    fixed = [BETS["fixed bet"](x, 0.1) for x in (lucky_first, unlucky_first)]
    assert fixed[0] == pytest.approx(fixed[1])


@pytest.mark.parametrize("name", BETS)
def test_negative_losses_help(name):
    zeros = np.zeros(400)
    better = zeros - (np.arange(400) % 10 == 0)
    assert BETS[name](better, 0.01) < BETS[name](zeros, 0.01)


@pytest.mark.parametrize("name", BETS)
def test_one_sample_never_ruins_the_player(name):
    assert 0 < BETS[name](np.ones(5), 0.01) <= 1


def test_hopeless_losses_are_no_overflow():
    assert [BETS[name](np.ones(20_000), 0.01) for name in BETS] == [1.0, 1.0]


def test_fixed_bet_is_safe_for_heavy_samples():
    heavy = 3.0 * losses(2, 50)
    assert 0 < fixed_bet_p_value(heavy, 0.1, delta=DELTA, before=BEFORE, highest=3.0) <= 1


# P-values against chance: at the target itself, small ones are no more frequent than they say


def share_below(p_value, draw, *, delta: float, draws: int = 2000) -> float:
    generator = np.random.default_rng(0)
    return float(np.mean([p_value(draw(generator)) <= delta for _ in range(draws)]))


def is_excessive(share: float, *, delta: float, draws: int = 2000) -> bool:
    return bool(binom.sf(round(share * draws) - 1, draws, delta) < 1e-3)


@pytest.mark.parametrize("name", P_VALUES)
@pytest.mark.parametrize("target", [0.05, 0.3])
def test_binary_losses_at_the_target_seldom_look_safe(name, target):
    def draw(generator):
        return (generator.random(150) < target).astype(float)

    share = share_below(lambda x: P_VALUES[name](x, target), draw, delta=DELTA)
    assert not is_excessive(share, delta=DELTA)
    assert share > 0  # and it is no bound that never speaks


@pytest.mark.parametrize("name", BETS)
def test_losses_with_a_sign_at_the_target_seldom_look_safe(name):
    def draw(generator):  # mean 0.02: 0.06 - 0.04
        return generator.choice([1.0, -1.0, 0.0], p=[0.06, 0.04, 0.9], size=300)

    share = share_below(lambda x: BETS[name](x, 0.02), draw, delta=DELTA)
    assert not is_excessive(share, delta=DELTA)
    assert share > 0


def test_a_set_number_from_each_class_weighted_to_a_prior_seldom_looks_safe():
    # Class 0 loses with 0.3 and has a share of 0.1; class 1 loses with 0.1: 0.12 in all. But of
    # the samples, half are of class 0; its samples weigh 0.2, the others 1.8.
    def draw(generator):
        first, second = generator.random(100) < 0.3, generator.random(100) < 0.1
        return np.concatenate([0.2 * first, 1.8 * second])

    p_value = partial(fixed_bet_p_value, delta=DELTA, before=BEFORE, highest=1.8)
    share = share_below(lambda x: p_value(x, 0.12), draw, delta=DELTA)
    assert not is_excessive(share, delta=DELTA)
    assert share > 0


def test_a_bound_that_is_none_is_caught():
    """The mean itself in place of a bound: the tests above would see it."""

    def naive(sample):
        return 0.0 if sample.mean() <= 0.05 else 1.0

    def draw(generator):
        return (generator.random(150) < 0.05).astype(float)

    assert is_excessive(share_below(naive, draw, delta=DELTA), delta=DELTA)


# Losses that are -1, 0 or 1


def signed(num_lost: int, num_gained: int, num_samples: int) -> np.ndarray:
    rest = num_samples - num_lost - num_gained
    return np.repeat([1.0, -1.0, 0.0], [num_lost, num_gained, rest])


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_trinomial_test_errs_no_more_often_than_it_says(delta):
    """Exactly, by summing over all counts of 1s and -1s, for shares on and above the boundary."""
    n, target = 50, 0.1
    pairs = [(lost, gained) for lost in range(25) for gained in range(25)]
    passes = np.array(
        [trinomial_p_value(signed(*pair, n), target, delta=delta) <= delta for pair in pairs]
    )
    counts = np.array([(*pair, n - sum(pair)) for pair in pairs])
    errs = []
    for share_gained in (0.0, 0.003, 0.01, 0.03, 0.06, 0.1, 0.15):
        for above in (0.0, 0.01):
            share_lost = share_gained + target + above
            shares = [share_lost, share_gained, 1 - share_lost - share_gained]
            errs.append(float(multinomial.pmf(counts[passes], n, shares).sum()))
    assert max(errs) <= delta
    assert max(errs) > delta / 3  # and it is not for nothing


def test_trinomial_test_knows_better_than_bets():
    losses_N = signed(36, 24, 2000)
    bet = fixed_bet_p_value(losses_N, 0.02, delta=0.05, before=losses_N[::4])
    assert trinomial_p_value(losses_N, 0.02, delta=0.05) < 0.7 * bet


def test_trinomial_test_goes_by_counts_alone_and_by_their_sense():
    shuffled = np.random.default_rng(0).permutation(signed(8, 5, 600))
    value = trinomial_p_value(signed(8, 5, 600), 0.02, delta=0.1)
    assert trinomial_p_value(shuffled, 0.02, delta=0.1) == value
    assert trinomial_p_value(signed(9, 5, 600), 0.02, delta=0.1) > value
    assert trinomial_p_value(signed(8, 6, 600), 0.02, delta=0.1) < value
    assert trinomial_p_value(signed(8, 5, 600), 0.03, delta=0.1) < value


def test_trinomial_test_of_binary_losses_is_nearly_the_binomial_one():
    for num_lost in (0, 2, 5):
        exact = binomial_p_value(losses(num_lost, 400), 0.03)
        assert (
            exact <= trinomial_p_value(losses(num_lost, 400), 0.03, delta=0.05) < 3 * exact + 0.01
        )


def test_trinomial_test_of_extreme_counts():
    assert trinomial_p_value(signed(0, 300, 300), 0.01, delta=0.05) == 0.05 / 50
    assert trinomial_p_value(signed(300, 0, 300), 0.01, delta=0.05) == 1
    assert trinomial_p_value(signed(0, 0, 1), 0.01, delta=0.05) > 0.9


def test_ties_count_as_the_worse_answer_at_early_exits_and_the_better_at_the_last():
    tied = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-6], [1.0 + 1e-6, 1.0]])
    clear = torch.tensor([[2.0, 1.0]] * 3)
    costs = ExitCosts(stage_macs=(1, 1), head_macs=(0, 0))
    for first, final, gap, error in (
        (tied, clear, [1, 1, 1], [1, 1, 1]),
        (tied, tied, [1, 1, 1], [1, 1, 1]),
        (clear, tied, [0, 0, 0], [0, 0, 0]),
        (clear, clear, [0, 0, 0], [0, 0, 0]),
    ):
        logits = ExitLogits(
            logits_KNC=torch.stack([first, final]),
            labels_N=torch.zeros(3, dtype=torch.int64),
            costs=costs,
        )
        assert cautious_losses("accuracy_gap", logits).tolist() == [gap, [0, 0, 0]]
        assert cautious_losses("error", logits)[0].tolist() == error
        assert cautious_losses("disagreement", logits)[1].tolist() == [0, 0, 0]
    assert np.array_equal(cautious_losses("brier_gap", ANSWERS), RISKS["brier_gap"].losses(ANSWERS))
