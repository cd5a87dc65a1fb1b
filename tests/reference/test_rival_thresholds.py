"""Offramp's ways of choosing thresholds against others, written out in rival_thresholds.py."""

import sys
from pathlib import Path

import numpy as np
import pytest
from rival_thresholds import (
    first_sure_exit,
    geometric_shares,
    learn_then_test,
    shared_thresholds,
    waudby_smith_ramdas,
)

from offramp.calibration.search import exits_left_by

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
INF = np.inf


def random_confidences(seed: int) -> np.ndarray:
    confidence_KN = np.random.default_rng(seed).random((3, 40))
    confidence_KN[:, ::7] = np.nan
    return confidence_KN


@pytest.mark.parametrize("thresholds", [(0.5, 0.5), (0.0, 0.9), (INF, 0.2), (INF, INF)])
def test_exits_are_those_found_sample_by_sample(thresholds):
    confidence_KN = random_confidences(0)
    expected = first_sure_exit(confidence_KN, thresholds)
    np.testing.assert_array_equal(exits_left_by(confidence_KN, thresholds), expected)


def test_geometric_shares_by_hand():
    confidence_KN = np.array([[0.9, 0.8, 0.1, 0.2], [0.9, 0.1, 0.3, 0.4], [0.0] * 4])
    # With q = 1 each exit gets a third of four samples: one each, the surest that is left.
    assert geometric_shares(confidence_KN, 1.0) == (0.9, 0.4)


def test_shared_thresholds_reach_from_everybody_to_nobody():
    confidence_KN = np.random.default_rng(1).random((3, 50))
    candidates = shared_thresholds(confidence_KN, count=5)
    shares = [np.mean(exits_left_by(confidence_KN, c) == 0) for c in candidates]
    assert shares == sorted(shares, reverse=True)
    assert (shares[0], shares[-1]) == (1, 0)


def test_learn_then_test_stops_at_the_first_failure():
    generator = np.random.default_rng(2)
    confidence_KN = generator.random((2, 2000))
    # Only unsure samples lose by leaving.
    gap_KN = np.stack([(confidence_KN[0] < 0.4).astype(float), np.zeros(2000)])
    (level,) = learn_then_test(confidence_KN, gap_KN, 0.05, 0.05)
    assert 0.34 < level < 0.4
    losses = np.where(confidence_KN[0] >= level, gap_KN[0], 0)
    assert waudby_smith_ramdas(losses, 0.05, 0.05) <= 0.05
    assert learn_then_test(confidence_KN, np.ones((2, 2000)), 0.05, 0.05) is None


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("thresholds", "guarantee", "pools", "record"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emnist-convnet", "cifar10-resnet"])
def test_search_is_no_worse_than_its_rivals_on_real_logits(benchmarks, name):
    """The benchmark's bars, on fewer re-splits."""
    import thresholds

    found = thresholds.measure(name, num_splits=5, num_calibration=5000, rule="entropy")
    assert all(gain["bar_met"] for gain in found["gains"].values())
    assert found["realised_shares"][-1] < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emnist-convnet", "cifar10-resnet"])
def test_guarantees_hold_and_save_on_real_logits(benchmarks, name):
    """The benchmark's bars, on fewer draws."""
    import guarantee

    pool = guarantee.Pool(name, guarantee.read_pool(name), guarantee.read_front(name))
    cells = [
        cell
        for risk in guarantee.RISK_NAMES
        for size in guarantee.SIZES[:2]
        for cell in guarantee.cells_of(pool, risk, size, draws=100)
    ]
    guarantee.judge(cells)
    assert all(cell["holds"] for cell in cells)
    use = guarantee.compare_use(pool, draws=40)
    assert use["bars_met"]
    assert use["violations"]["naive"] > 10  # without a guarantee, the target is often missed
