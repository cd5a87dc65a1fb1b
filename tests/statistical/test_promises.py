"""Promises repeated: violations are held to what was promised, by a binomial test."""

from dataclasses import replace

import numpy as np
import pytest
from made_up_logits import three_exits
from scipy.stats import binom

from offramp.calibration.guarantee import calibrate_with_guarantee
from offramp.calibration.risk import RISKS
from offramp.calibration.search import exits_left_by
from offramp.calibration.thresholds import confidences
from offramp.errors import InfeasibleTargetError

# Unit tests run the same lines; here they run thousands of times.
pytestmark = pytest.mark.no_cover

DRAWS = 80
GUARANTEE = 0.8


def made_up(seed, num_samples, signal=(1.5, 2.5, 4.0)):
    return three_exits(seed, num_samples, signal=signal, noise=1.0)


POOL = made_up(0, 4000)
FINDING = {
    "drawn alike": made_up(1, 300),
    "far easier, as train is": made_up(2, 300, signal=(4.0, 6.0, 9.0)),
}


def drawn(seed: int, size: int, *, by_class: bool):
    generator = np.random.default_rng(seed)
    if not by_class:
        return POOL.take(generator.integers(0, len(POOL.labels_N), size))
    shares = POOL.class_counts / len(POOL.labels_N)
    rows = [
        generator.choice(np.flatnonzero(POOL.labels_N.numpy() == c), round(size * share))
        for c, share in enumerate(shares)
    ]
    return replace(POOL.take(np.concatenate(rows)), prior=tuple(shares.tolist()))


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("found_on", FINDING)
@pytest.mark.parametrize(("risk", "target"), [("accuracy_gap", 0.02), ("disagreement", 0.05)])
def test_promise_is_kept_where_other_samples_find_the_candidates(risk, target, found_on, by_class):
    confidence_KN = confidences(POOL, calibrate_with_guarantee(POOL, max_risk=0.5).policy)
    losses_KN = RISKS[risk].losses(POOL)
    violations = infeasible = 0
    for seed in range(DRAWS):
        try:
            found = calibrate_with_guarantee(
                drawn(seed, 400, by_class=by_class),
                max_risk=target,
                risk=risk,
                guarantee=GUARANTEE,
                finding=FINDING[found_on],
            )
        except InfeasibleTargetError:
            infeasible += 1
            continue
        exit_N = exits_left_by(confidence_KN, found.policy.thresholds)
        violations += losses_KN[exit_N, np.arange(len(exit_N))].mean() > target + 1e-12
    assert infeasible < DRAWS / 2
    assert binom.sf(violations - 1, DRAWS, 1 - GUARANTEE) > 0.01 / 8
