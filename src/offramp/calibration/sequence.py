"""Testing one policy after the other: which samples, which test, and what if none passes.

Shapes: ``N`` samples.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from offramp.calibration.labelled import LabelledLogits
from offramp.calibration.risk import (
    RISKS,
    betting_p_value,
    binomial_p_value,
    fixed_bet_p_value,
    trinomial_p_value,
)
from offramp.calibration.search import Floats
from offramp.calibration.targets import rounded_up
from offramp.errors import DataError, InfeasibleTargetError, InvalidArgumentError
from offramp.measure.arrays import as_array

_LARGEST_SAMPLE = 10**8
"""Up to here it is looked how many samples would do."""

_FINDING_SHARE = 0.3
"""Of the samples, those that find what is tested, or size the bets; the others test."""

Logits = TypeVar("Logits", bound=LabelledLogits)


def part_samples(logits: Logits, seed: int) -> tuple[Logits, Logits]:
    """Part samples at random into those that find and those that test.

    With a prior, each class is parted for itself. See :func:`in_random_order` for what the draw
    depends on.
    """
    drawn = in_random_order(logits, seed)
    if logits.prior is None:
        groups = [drawn]
    else:
        labels = as_array(logits.labels_N)[drawn]
        groups = [drawn[labels == c] for c in np.flatnonzero(logits.prior)]
    cuts = [_finding_size(len(group)) for group in groups]
    finding = np.concatenate([group[:cut] for group, cut in zip(groups, cuts, strict=True)])
    testing = np.concatenate([group[cut:] for group, cut in zip(groups, cuts, strict=True)])
    return logits.take(finding), logits.take(testing)


def in_random_order(logits: LabelledLogits, seed: int) -> npt.NDArray[np.int64]:
    """Numbers of the samples in a random order that is the same on every machine.

    The labels, in the order of the samples, and the seed draw it. The logits take no part: they
    differ in their last bits between processors, and so would everything that is chosen. Since the
    order is random, samples may come sorted, by class or by how sure the exits are. Since the
    labels take part, two sets of samples of the same size are not drawn from at the same places.
    """
    if not isinstance(seed, Integral) or seed < 0:
        raise InvalidArgumentError(
            f"The 'seed' parameter must be an int of at least 0. Got {seed!r}."
        )
    labels = as_array(logits.labels_N).tobytes()
    digest = np.frombuffer(hashlib.sha256(labels).digest(), dtype="<u4")
    return np.random.default_rng([seed, *digest.tolist()]).permutation(len(logits.labels_N))


def check_disjoint(finding: LabelledLogits, testing: LabelledLogits) -> None:
    """Refuse samples that find candidates where they are also among those that test them.

    Samples count as the same where every logit and the label are. Some may be so by chance: as
    many as repeat among the finding or the testing samples themselves, and one in a hundred.
    """
    found, tested = (_fingerprints(each) for each in (finding, testing))
    known = Counter(found)
    shared = sum(known[each] for each in tested)
    repeated = sum(n * (n - 1) // 2 for each in (known, Counter(tested)) for n in each.values())
    if shared > repeated + len(tested) // 100:
        raise DataError(
            "Expected samples as 'finding' that are not among those that test. "
            f"{sum(each in known for each in tested):,} of the {len(tested):,} that test are in "
            "both: leave them out of 'finding', or leave out 'finding' to part the samples."
        )


def _fingerprints(logits: LabelledLogits) -> list[bytes]:
    rows_N = zip(as_array(logits.logits_KNC).swapaxes(0, 1), as_array(logits.labels_N), strict=True)
    return [hashlib.sha256(said.tobytes() + label.tobytes()).digest() for said, label in rows_N]


def _finding_size(num_samples: int) -> int:
    if num_samples < 2:
        raise InvalidArgumentError(
            "A guarantee needs at least 2 samples (with a prior, 2 of each class that it holds): "
            f"some find the candidates, others test them. Got {num_samples}."
        )
    return max(1, round(_FINDING_SHARE * num_samples))


@dataclass(frozen=True, kw_only=True)
class SequenceTest:
    """Decides whether policies pass, one after the other.

    Attributes:
        method: Its name.
        limit: A policy passes whose value is at most this.
        value: From losses on the finding and on the testing samples, target, and a number of
            testing samples (more than there are asks what more of the same would give).
        keeps_worst: Whether a sample's loss counts at its worst so far, so that it only grows.
        needs_finding: Whether it reads the losses on the finding samples.
    """

    method: str
    limit: float
    value: Callable[[Floats, Floats, float, int], float]
    keeps_worst: bool = False
    needs_finding: bool = False


def choose_test(risk: str, testing: LabelledLogits, *, guarantee: float | str) -> SequenceTest:
    """The test that fits a risk and the samples."""
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
    if RISKS[risk].is_ternary and testing.prior is None:

        def trinomial_value(found_N: Floats, tested_N: Floats, max_risk: float, n: int) -> float:
            return trinomial_p_value(tested_N, max_risk, delta=delta, num_samples=n)

        return SequenceTest(method="exact trinomial", limit=delta, value=trinomial_value)
    if testing.prior is None:
        bet = partial(betting_p_value, delta=delta)
    else:
        bet = partial(fixed_bet_p_value, delta=delta, highest=max(1.0, float(weights_N.max())))

    def betting_value(found_N: Floats, tested_N: Floats, max_risk: float, n: int) -> float:
        p_value = bet(tested_N, max_risk, before=found_N, num_samples=n)
        return float(p_value ** (n / len(tested_N)))

    return SequenceTest(method="betting", limit=delta, value=betting_value, needs_finding=True)


def passing_values(
    test: SequenceTest,
    losses: Iterable[tuple[Floats, Floats]],
    max_risk: float,
    *,
    num_samples: int,
) -> list[float]:
    """Test one policy after the other until the first that fails (fixed sequence)."""
    passed: list[float] = []
    worst_N = np.array(-math.inf)
    for found_N, tested_N in losses:
        if test.keeps_worst:
            worst_N = tested_N = np.maximum(worst_N, tested_N)
        value = test.value(found_N, tested_N, max_risk, len(tested_N))
        if value > test.limit:
            break
        passed.append(value)
    if not passed:
        raise _infeasible(test, found_N, tested_N, max_risk=max_risk, num_samples=num_samples)
    return passed


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
    """Distance of the bound on the mean risk above the target; no loss is above 1."""
    return (n * float(tested_N.mean()) + 1) / (n + 1) - max_risk


def _infeasible(
    test: SequenceTest, found_N: Floats, tested_N: Floats, *, max_risk: float, num_samples: int
) -> InfeasibleTargetError:
    """Say how many samples would do for the safest policy, and which target these allow."""

    def passes(target: float, n: float) -> bool:
        return test.value(found_N, tested_N, target, math.ceil(n)) <= test.limit

    enough = _first_true(lambda n: passes(max_risk, n), len(tested_N), _LARGEST_SAMPLE)
    allowed = _first_true(lambda target: passes(target, len(tested_N)), max_risk, 1 - 1e-6)
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
