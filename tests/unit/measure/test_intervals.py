import numpy as np
import pytest

from offramp.measure.intervals import difference_interval, mean_interval, share_interval


def test_share_interval_is_that_of_clopper_and_pearson():
    found = share_interval(2, 20)
    assert (found.value, found.method) == (0.1, "exact")
    assert (found.low, found.high) == pytest.approx((0.0123, 0.3170), abs=1e-4)


def test_share_of_all_ends_at_one():
    found = share_interval(20, 20)
    assert (found.low, found.high) == pytest.approx((0.8316, 1), abs=1e-4)


@pytest.mark.parametrize("n", [9, 100, 2000])
def test_no_difference_leaves_about_four_samples_of_doubt(n):
    found = difference_interval(0, 0, n)
    z2 = 1.959964**2
    assert (found.low, found.high) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), rel=1e-4)


def test_score_interval_of_a_published_example():
    # Newcombe (1998), Improved confidence intervals for the difference between binomial
    # proportions based on paired data, Table III: (43, 0, 1, 0) by Tango's method.
    found = difference_interval(1, 0, 44)
    assert (found.low, found.high) == pytest.approx((-0.0594, 0.1181), abs=1e-4)


def test_score_interval_turns_round_with_the_difference():
    one, other = difference_interval(12, 5, 80), difference_interval(5, 12, 80)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    assert one.low < one.value == 7 / 80 < one.high


def test_score_interval_covers_as_often_as_it_says():
    random, shares = np.random.default_rng(0), (0.03, 0.01)
    draws = random.multinomial(300, [*shares, 1 - sum(shares)], size=400)
    found = [difference_interval(int(more), int(less), 300) for more, less, _ in draws]
    covered = np.mean([each.low <= 0.02 <= each.high for each in found])
    assert 0.92 < covered < 0.985


def test_mean_interval_is_near_the_normal_one_and_the_same_each_time():
    values_N = np.random.default_rng(0).normal(2.0, 1.0, size=400)
    found = mean_interval(values_N)
    half = 1.96 * values_N.std() / 20
    expected = (values_N.mean() - half, values_N.mean() + half)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.02)
    assert found == mean_interval(values_N)
