"""Searching one threshold per exit, jointly.

For fixed thresholds elsewhere, every possible threshold of one exit is scored at once: its samples
are sorted by confidence, and running sums give worth and cost of letting the surest j leave. Rounds
of this over the exits climb a price for compute (worth minus price times cost); a sweep over prices
walks along the trade-off.

Where worth is no mean over samples, as mean IoU is none, samples count as vectors, and a function
says what a mean vector is worth.

Shapes: ``K`` exits, ``N`` samples, ``J`` candidate thresholds of one exit, ``D`` numbers of a
vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from offramp.measure.exit_costs import ExitCosts

Floats = npt.NDArray[np.float64]
Score = Callable[[Floats, Floats], Floats]
"""From mean worths and mean MACs of candidates to how good each is; -inf where not allowed."""

Worth = Callable[[Floats], Floats]
"""From mean vectors of candidates, shape (J, D), to what they are worth, shape (J,)."""

_PRICES = np.geomspace(1e-3, 3.0, 24)
"""Worth that a plain network's worth of MACs has, from cheap to dear."""

_FRONT_PRICES = np.geomspace(1e-3, 1.0, 40)
"""As above, for walking along the front; those beyond 1 would only repeat its cheap end."""

_FRONT_LEVELS = 64
"""Thresholds of an exit that the front is made of. With all that there are, many points are as good
as their neighbours, and the last bits of confidences would decide where the walk goes."""

_BETWEEN = (0.25, 0.5, 0.75)
"""Places of candidates between two neighbours on the front."""

_MAX_ROUNDS = 8
"""Rounds over the exits for one price; most settle in three."""


def evaluate_thresholds(
    confidence_KN: Floats,
    correct_KN: Floats,
    costs: ExitCosts,
    thresholds: Sequence[float],
    weights_N: Floats | None = None,
) -> tuple[float, float]:
    """Accuracy and mean MACs of given thresholds on collected samples."""
    off = frozenset(k for k, threshold in enumerate(thresholds) if threshold == math.inf)
    exit_N = exits_left_by(confidence_KN, thresholds)
    correct_N = correct_KN[exit_N, np.arange(len(exit_N))]
    macs_K = np.asarray(costs.exit_macs(off), dtype=np.float64)
    accuracy = np.average(correct_N, weights=weights_N)
    return float(accuracy), float(np.average(macs_K[exit_N], weights=weights_N))


def exits_left_by(confidence_KN: Floats, thresholds: Sequence[float]) -> npt.NDArray[np.int64]:
    """The exit that each sample leaves by."""
    num_exits, num_samples = confidence_KN.shape
    exit_N = np.full(num_samples, num_exits - 1)
    for k in reversed(range(num_exits - 1)):
        # Compared at single precision, as engines compare.
        exit_N[confidence_KN[k].astype(np.float32) >= np.float32(thresholds[k])] = k
    return exit_N


class ThresholdSearch:
    """Coordinate search over one threshold per exit."""

    def __init__(
        self,
        confidence_KN: Floats,
        worth_KN: Floats,
        costs: ExitCosts,
        *,
        weights_N: Floats,
        worth: Worth | None = None,
        off: frozenset[int] = frozenset(),
        may_switch_off: bool = True,
    ) -> None:
        # NaN sorts and compares as less sure than anything.
        self.confidence_KN = np.nan_to_num(confidence_KN, nan=-1.0)
        self.worth_KN = worth_KN
        self.costs = costs
        self.weights_N = weights_N
        self.num_exits, self.num_samples = worth_KN.shape[:2]
        self._worth: Worth = worth or (lambda mean_J: mean_J)
        self.searched = [k for k in range(self.num_exits - 1) if k not in off]
        self._may_switch_off = may_switch_off
        self.order_KN = np.argsort(-self.confidence_KN, axis=1, kind="stable")
        self._score: Score | None = None
        self._levels: list[Floats] | None = None
        self._best: tuple[float, tuple[float, ...]]
        self.cheapest_macs = math.inf

    def best(self, score: Score) -> tuple[tuple[float, ...], float]:
        """Sweep the prices both ways, then climb the target itself from the best point."""
        self._score, self._levels = score, None
        nobody = (math.inf,) * (self.num_exits - 1)
        off = frozenset(range(self.num_exits - 1))
        self.cheapest_macs = float(self.costs.exit_macs(off)[-1])
        worth_1 = self._worth(np.average(self.worth_KN[-1:], axis=1, weights=self.weights_N))
        self._best = float(score(worth_1, np.array([self.cheapest_macs]))[0]), nobody
        for prices, is_open in ((_PRICES, False), (_PRICES[::-1], True)):
            thresholds = self._start(is_open=is_open)
            for price in prices:
                self._climb(thresholds, self._at_price(price))
        if self._may_switch_off or self._best[1] != nobody:  # where nobody leaves, all are off
            self._climb(list(self._best[1]), score)
        return self._best[1], self._best[0]

    def front(self) -> list[tuple[float, ...]]:
        """Walk along the trade-off of worth and cost, from where nobody leaves to the cheap end."""
        self._score = None
        self._levels = [
            _levels(self.confidence_KN[k][self.order_KN[k]]) for k in range(self.num_exits - 1)
        ]
        thresholds = self._start(is_open=False)
        points = [(math.inf,) * (self.num_exits - 1), tuple(thresholds)]
        for price in _FRONT_PRICES:
            dear = points[-1]
            self._climb(thresholds, self._at_price(price))
            points += [self._between(dear, thresholds, part) for part in _BETWEEN]
            points.append(tuple(thresholds))
        return list(dict.fromkeys(points))

    def _between(
        self, dear: Sequence[float], cheap: Sequence[float], part: float
    ) -> tuple[float, ...]:
        """Thresholds at which a part of those leave early who leave by the one and not the other.

        As if each exit were the first; where an exit is switched on, its surest samples go first.
        """
        between = []
        for k, pair in enumerate(zip(dear, cheap, strict=True)):
            at_dear, at_cheap = (int((self.confidence_KN[k] >= t).sum()) for t in pair)
            rank = round((1 - part) * at_dear + part * at_cheap)
            closed = math.inf if self._may_switch_off or k not in self.searched else 1.0
            least_sure = self.confidence_KN[k][self.order_KN[k][rank - 1]] if rank else closed
            between.append(max(0.0, float(least_sure)))
        return tuple(between)

    def _start(self, *, is_open: bool) -> list[float]:
        """Everybody leaves at the first exit, or nobody leaves early."""
        thresholds = [math.inf] * (self.num_exits - 1)
        for k in self.searched:
            thresholds[k] = 0.0 if is_open else math.inf if self._may_switch_off else 1.0
        return thresholds

    def _at_price(self, price: float) -> Score:
        plain_macs = self.costs.plain_macs
        return lambda worth_J, macs_J: worth_J - price * macs_J / plain_macs

    def _climb(self, thresholds: list[float], objective: Score) -> None:
        """Improve ``thresholds`` in place, an exit at a time, until none changes."""
        for _ in range(_MAX_ROUNDS):
            before = list(thresholds)
            for k in self.searched:
                candidates_J, worth_J, macs_J = self._scan(k, thresholds)
                self.cheapest_macs = min(self.cheapest_macs, float(macs_J.min()))
                if self._score is not None:
                    scores_J = self._score(worth_J, macs_J)
                    j = int(scores_J.argmax())
                    if scores_J[j] > self._best[0]:
                        point = (*thresholds[:k], float(candidates_J[j]), *thresholds[k + 1 :])
                        self._best = float(scores_J[j]), point
                values_J = objective(worth_J, macs_J)
                if np.isfinite(values_J).any():
                    thresholds[k] = float(candidates_J[values_J.argmax()])
            if thresholds == before:
                return

    def _scan(self, k: int, thresholds: list[float]) -> tuple[Floats, Floats, Floats]:
        """Mean worth and MACs for every threshold of exit k, the others held fixed."""
        others_off = {j for j, t in enumerate(thresholds) if t == math.inf} - {k}
        exit_macs = self.costs.exit_macs(frozenset(others_off))
        without_k = [*thresholds[:k], math.inf, *thresholds[k + 1 :]]
        exit_N = exits_left_by(self.confidence_KN, without_k)
        weighs_N = self.weights_N.reshape(-1, *(1 for _ in self.worth_KN.shape[2:]))
        worth_N = weighs_N * self.worth_KN[exit_N, np.arange(self.num_samples)]
        macs_N = self.weights_N * np.asarray(exit_macs, dtype=np.float64)[exit_N]

        order = self.order_KN[k]
        order = order[exit_N[order] > k]  # whoever reaches exit k, surest first
        weights = self.weights_N[order]
        gain = np.cumsum(weighs_N[order] * self.worth_KN[k][order] - worth_N[order], axis=0)
        saving = np.cumsum(weights * exit_macs[k] - macs_N[order])
        counts, cuts = self._cuts_of(k, self.confidence_KN[k][order])
        gains_J = np.concatenate([np.zeros((1, *gain.shape[1:])), gain])[np.append(0, counts)]
        worth_J = self._worth((worth_N.sum(0) + gains_J) / self.num_samples)
        savings_J = np.append(0.0, saving)[np.append(0, counts)]
        macs_J = (macs_N.sum() + savings_J) / self.num_samples
        if self._may_switch_off:
            macs_J[0] -= self.costs.head_macs[k] * weights.sum() / self.num_samples
            return np.append(math.inf, cuts), worth_J, macs_J
        # A threshold of 1 keeps everybody in, unless somebody is as sure as that.
        first = 1 if len(cuts) and self.confidence_KN[k][order[0]] >= 1 else 0
        return np.append(1.0, cuts)[first:], worth_J[first:], macs_J[first:]

    def _cuts_of(self, k: int, descending: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
        """Count the samples that leave at thresholds of exit k, and name the thresholds."""
        if self._levels is None:
            ends, cuts = _cuts(descending)
            return ends + 1, cuts
        levels = self._levels[k]
        return np.searchsorted(-descending, -levels, side="right"), levels


def _levels(descending: Floats) -> Floats:
    """Some of the thresholds that can part samples, with about as many between each two."""
    ends, cuts = _cuts(descending)
    wanted = np.linspace(0, len(descending) - 1, _FRONT_LEVELS + 1)[1:]
    chosen = np.unique(np.searchsorted(ends, wanted).clip(max=len(ends) - 1))
    return cuts[chosen] if len(cuts) else cuts


def _cuts(descending: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """Find where a threshold can part samples sorted by confidence, and the thresholds that do.

    A cut is possible where the confidence changes, and after everyone who may leave (at least 0).
    """
    following = np.append(descending[1:], -1.0)
    ends = np.flatnonzero((descending > following) & (descending >= 0))
    surest_left, next_sure = descending[ends], following[ends]
    # Halfway, unless float32, which confidences are, has no number in between.
    cuts = ((surest_left + next_sure) / 2).astype(np.float32).astype(np.float64)
    cuts = np.where(cuts > next_sure, cuts, surest_left)
    cuts[next_sure < 0] = 0.0
    return ends, cuts
