"""Intervals for what was measured on a sample of a population.

Shapes: ``N`` samples, ``R`` resamples, ``D`` values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import beta, norm

Array = npt.NDArray[Any]

LEVEL = 0.95
"""Probability that an interval covers the population's value."""
_RESAMPLES = 1000
_AT_A_TIME = 50
_SEED = 0
_NEAR = 1e-9
"""A search for an end of an interval begins at this share of the way from value to limit."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure, and where the population's may lie.

    Attributes:
        value: As measured.
        low: Lower end of the 95 % interval.
        high: Upper end.
        method: How the interval was found: "exact", "score" or "bootstrap".
    """

    value: float
    low: float
    high: float
    method: str


def share_interval(count: int, num_samples: int) -> Interval:
    """Bound a share from below and above.

    Reference: Clopper and Pearson (1934).
    Example:
        >>> found = share_interval(0, 100)
        >>> found.low, round(found.high, 4)
        (0.0, 0.0362)
    """
    tail, rest = (1 - LEVEL) / 2, num_samples - count
    return Interval(
        value=count / num_samples,
        low=float(beta.ppf(tail, count, rest + 1)) if count else 0.0,
        high=float(beta.ppf(1 - tail, count + 1, rest)) if rest else 1.0,
        method="exact",
    )


def difference_interval(more: int, less: int, num_samples: int) -> Interval:
    """Bound the mean of paired differences that are 1, -1 or 0.

    Reference: Tango (1998), Equivalence test and confidence interval for the difference in
        proportions for the paired-sample design.
    Example:
        >>> found = difference_interval(0, 0, 100)
        >>> found.value, round(found.low, 3), round(found.high, 3)
        (0.0, -0.037, 0.037)
    """
    value, z = (more - less) / num_samples, float(norm.ppf(1 - (1 - LEVEL) / 2))

    def refused_by(mean: float) -> float:
        """Distance of the test from its limit, falling from the value to both sides."""
        double, diff = 2 * num_samples, more - less
        middle = -more - less + (double - diff) * mean
        root = math.sqrt(max(0.0, middle**2 + 4 * double * less * mean * (1 - mean)))
        share = (root - middle) / (2 * double)  # of -1, the likeliest at this mean
        variance = num_samples * (2 * share + mean * (1 - mean))
        return abs(diff - num_samples * mean) - z * math.sqrt(max(0.0, variance))

    def end_towards(limit: float) -> float:
        inside = value + _NEAR * (limit - value)
        if refused_by(limit) <= 0 or inside == limit:
            return limit
        return float(brentq(refused_by, inside, limit))

    return Interval(value=value, low=end_towards(-1.0), high=end_towards(1.0), method="score")


def mean_interval(values_N: Array) -> Interval:
    """Bound a mean by drawing the samples anew.

    Reference: Efron and Tibshirani (1993), An introduction to the bootstrap, chapter 13.
    """
    means = [means_RD[:, 0] for means_RD in resampled_means(np.asarray(values_N)[:, None])]
    return interval_of(float(np.mean(values_N)), np.concatenate(means))


def resampled_means(values_ND: Array) -> Iterator[Array]:
    """Draw samples anew 1,000 times, the same draws for the same number of samples."""
    random, size = np.random.default_rng(_SEED), len(values_ND)
    for _ in range(_RESAMPLES // _AT_A_TIME):
        rows = (random.integers(size, size=size) for _ in range(_AT_A_TIME))
        counts_RN = np.stack([np.bincount(drawn, minlength=size) for drawn in rows])
        yield counts_RN @ values_ND.astype(np.float64) / size


def interval_of(value: float, resampled_R: Array) -> Interval:
    """Take the middle 95 % of what resamples gave."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled_R, (tail, 1 - tail)).tolist()
    return Interval(value=value, low=low, high=high, method="bootstrap")
