"""Testing one policy after the other: which test, and what to say if not even the first passes.

Shapes: ``N`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.stats import binom

from offramp.calibration.collect import ExitLogits
from offramp.calibration.risk import RISKS, betting_p_value, binomial_p_value, fixed_bet_p_value
from offramp.calibration.search import Floats
from offramp.calibration.thresholds import rounded_up
from offramp.errors import InfeasibleTargetError, InvalidArgumentError

_LARGEST_SAMPLE = 10**8
"""Up to here it is looked how many samples would do."""


@dataclass(frozen=True, kw_only=True)
class SequenceTest:
    """Decides whether policies pass, one after the other.

    Attributes:
        method: Its name.
        limit: A policy passes whose value is at most this.
        value: From losses on the finding and on the testing samples, target, and a number of
            testing samples (more than there are asks what more of the same would give).
        keeps_worst: Whether a sample's loss counts at its worst so far, so that it only grows.
    """

    method: str
    limit: float
    value: Callable[[Floats, Floats, float, int], float]
    keeps_worst: bool = False


def choose_test(risk: str, testing: ExitLogits, *, guarantee: float | str) -> SequenceTest:
    """The test that fits a risk and the samples.

    Args:
        risk: What is bounded.
        testing: The samples that test; only their labels and weights matter here.
        guarantee: A probability, or "mean".
    Returns:
        The test.
    Raises:
        InvalidArgumentError: If a promise on average is asked of unevenly weighted samples.
    """
    weights_N = testing.weights_N
    is_even = bool(np.allclose(weights_N, 1))
    if isinstance(guarantee, str):
        if not is_even:
            raise InvalidArgumentError(
                "A promise on average needs samples that all weigh the same. These are weighted "
                "to a prior: give a probability as the guarantee."
            )
        return SequenceTest(
            method="conformal risk control", limit=0, value=_conformal_value, keeps_worst=True
        )
    delta = 1 - guarantee
    if RISKS[risk].is_binary and is_even:
        is_drawn_by_class = testing.prior is not None
        value = partial(_binomial_value, is_drawn_by_class=is_drawn_by_class)
        return SequenceTest(method="exact binomial", limit=delta, value=value)
    if testing.prior is None:
        bet = partial(betting_p_value, delta=delta)
    else:
        bet = partial(fixed_bet_p_value, delta=delta, highest=max(1.0, float(weights_N.max())))

    def betting_value(found_N: Floats, tested_N: Floats, max_risk: float, n: int) -> float:
        p_value = bet(tested_N, max_risk, before=found_N, num_samples=n)
        return float(p_value ** (n / len(tested_N)))

    return SequenceTest(method="betting", limit=delta, value=betting_value)


def _binomial_value(
    found_N: Floats, tested_N: Floats, max_risk: float, n: int, *, is_drawn_by_class: bool
) -> float:
    if is_drawn_by_class and n * float(tested_N.mean()) > n * max_risk - 1:
        return 1.0  # Hoeffding's theorem is about fewer losses than that
    if n == len(tested_N):
        return binomial_p_value(tested_N, max_risk)
    lost = math.ceil(n * float(tested_N.mean()) - 1e-6)
    return float(binom.cdf(lost, n, max_risk))


def _conformal_value(found_N: Floats, tested_N: Floats, max_risk: float, n: int) -> float:
    """How far the bound on the mean risk is above the target; no loss is above 1."""
    return (n * float(tested_N.mean()) + 1) / (n + 1) - max_risk


def infeasible(
    test: SequenceTest, found_N: Floats, tested_N: Floats, *, max_risk: float
) -> InfeasibleTargetError:
    """Say how many samples would do for the safest policy, and which target these allow.

    Args:
        test: The test that it did not pass.
        found_N: Its losses on the samples that found the front.
        tested_N: Its losses on those that test.
        max_risk: The target.
    Returns:
        The error to raise.
    """

    def passes(target: float, n: float) -> bool:
        return test.value(found_N, tested_N, target, math.ceil(n)) <= test.limit

    enough = _first_true(lambda n: passes(max_risk, n), len(tested_N), _LARGEST_SAMPLE)
    allowed = _first_true(lambda target: passes(target, len(tested_N)), max_risk, 1 - 1e-6)
    num_samples = len(found_N) + len(tested_N)
    if enough is None:
        remedy = (
            f"no number of them would do, since even the safest policy loses {tested_N.mean():.4f} "
            "on them"
        )
    else:
        needed = math.ceil(math.ceil(enough) * num_samples / len(tested_N))
        remedy = f"about {needed:,} would do, if they are like these"
    best = 1.0 if allowed is None else allowed
    return InfeasibleTargetError(
        f"{num_samples:,} calibration samples cannot promise a target of {max_risk:g}: {remedy}. "
        + (f"These can promise {rounded_up(best)}." if best < 1 else "These can promise nothing."),
        best_achievable=best,
    )


def _first_true(is_true: Callable[[float], bool], low: float, high: float) -> float | None:
    """The smallest number at which a condition holds that holds from some number on."""
    if not is_true(high):
        return None
    while high - low > max(1e-5 * high, 1e-7):
        middle = (low + high) / 2
        low, high = (low, middle) if is_true(middle) else (middle, high)
    return high
