"""Cuts that share a backbone out evenly, by whatever its pieces cost."""

from __future__ import annotations

import math
from collections.abc import Sequence


def choose_cuts(cumulative: Sequence[float], *, total: float, num_exits: int) -> tuple[int, ...]:
    """Choose the cuts nearest to equal shares of the whole.

    Cut k of ``num_exits - 1`` should come after k / num_exits of the whole; the sum of squared
    distances is as small as can be. Of equally good choices the earlier cuts are taken. Places
    less than a hundredth of the whole apart count as one, while there are enough others.

    Example:
        >>> choose_cuts([1.0, 4.0, 5.0, 9.0], total=12.0, num_exits=3)
        (1, 3)
    """
    num_cuts = num_exits - 1
    apart = _apart(cumulative, total / 100)
    candidates = apart if len(apart) >= num_cuts else range(len(cumulative))
    nothing: tuple[float, tuple[int, ...]] = (math.inf, ())
    # Entry k: the best choice of the first k cuts among the candidates seen so far.
    best = [(0.0, ()), *[nothing] * num_cuts]
    for index in candidates:
        for k in range(num_cuts, 0, -1):
            distance, cuts = best[k - 1]
            distance += (cumulative[index] - total * k / num_exits) ** 2
            best[k] = min(best[k], (distance, (*cuts, index)))
    return best[-1][1]


def _apart(cumulative: Sequence[float], least: float) -> list[int]:
    """The places that are at least so far after the one before."""
    apart: list[int] = []
    for index, cost in enumerate(cumulative):
        if not apart or cost - cumulative[apart[-1]] >= least:
            apart.append(index)
    return apart
