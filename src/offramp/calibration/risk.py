"""Risks of early exit, and tests of how sure one can be that they are low.

A risk is the mean of a loss over the population. A p-value says how likely losses as low as those
seen would be if the risk were above the target: below delta, the target holds with probability
1 - delta over the draw of the samples.

Shapes: ``K`` exits, or other ways of answering, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
from scipy.special import bdtr, betaincinv
from scipy.stats import binom, norm

from offramp.calibration.labelled import LabelledLogits
from offramp.calibration.search import Floats
from offramp.errors import InvalidArgumentError
from offramp.measure.arrays import as_array, softmax
from offramp.measure.outputs import LABELS, MAPS, Outputs

PIXEL_ERROR_GAP = "pixel_error_gap"
"""The only risk of images with a class for every pixel: mean IoU is no mean over images."""

_TIE = 2e-5
"""Logits that are nearer than this are tied."""

_ROUNDING = 1e-9
"""By how much a sum of whole losses may be off one."""


@dataclass(frozen=True, kw_only=True)
class Risk:
    """A loss per way of answering and sample.

    Attributes:
        losses: From logits to the loss of each sample that is answered in each way, as one that
            leaves by each exit is, shape (K, N).
        is_binary: Whether every loss is 0 or 1.
        is_ternary: Whether every loss is -1, 0 or 1.
        outputs: What it is a risk of.
        counts_errors: Whether it differs between ways by right and wrong answers only.
        in_words: From a target, the cheap way and the last one, by name, to what is promised.
    """

    losses: Callable[[LabelledLogits], Floats]
    is_binary: bool
    counts_errors: bool
    in_words: Callable[[float, str, str], str]
    is_ternary: bool = False
    outputs: Outputs = LABELS


def _accuracy_gap(logits: LabelledLogits) -> Floats:
    correct_KN = as_array(logits.correct_KN).astype(np.float64)
    gap_KN: Floats = correct_KN[-1] - correct_KN
    return gap_KN


def _disagreement(logits: LabelledLogits) -> Floats:
    predicted_KN = logits.predicted_KN
    disagrees_KN: Floats = (predicted_KN != predicted_KN[-1]).astype(np.float64)
    return disagrees_KN


def _error(logits: LabelledLogits) -> Floats:
    wrong_KN: Floats = (~as_array(logits.correct_KN)).astype(np.float64)
    return wrong_KN


def _brier_gap(logits: LabelledLogits) -> Floats:
    labels_N = as_array(logits.labels_N)
    brier_KN = np.stack([_brier(said, labels_N) for said in as_array(logits.logits_KNC)])
    gap_KN: Floats = brier_KN - brier_KN[-1]
    return gap_KN


def _brier(logits_NC: Any, labels_N: Any) -> Floats:
    """Half the squared distance of the probabilities from the label, in [0, 1]; 1 for NaN."""
    p_NC = softmax(logits_NC)
    of_label_N = p_NC[np.arange(len(labels_N)), labels_N]
    score_N: Floats = np.nan_to_num(((p_NC**2).sum(-1) - 2 * of_label_N + 1) / 2, nan=1.0)
    return score_N


RISKS = {
    "accuracy_gap": Risk(
        losses=_accuracy_gap,
        is_binary=False,
        is_ternary=True,
        counts_errors=True,
        in_words=lambda target, way, last: (
            f"{way} loses at most {100 * target:g} percentage "
            f"{'point' if target == 0.01 else 'points'} of accuracy against {last}"
        ),
    ),
    "disagreement": Risk(
        losses=_disagreement,
        is_binary=True,
        counts_errors=False,
        in_words=lambda target, way, last: (
            f"at most {100 * target:g} % of the answers differ from {last}'s"
        ),
    ),
    "error": Risk(
        losses=_error,
        is_binary=True,
        counts_errors=True,
        in_words=lambda target, way, last: f"at most {100 * target:g} % of the answers are wrong",
    ),
    "brier_gap": Risk(
        losses=_brier_gap,
        is_binary=False,
        counts_errors=False,
        in_words=lambda target, way, last: (
            f"{way}'s Brier score (in [0, 1]) is at most {target:g} above {last}'s"
        ),
    ),
    PIXEL_ERROR_GAP: Risk(
        losses=_accuracy_gap,
        is_binary=False,
        counts_errors=True,
        in_words=lambda target, way, last: (
            f"{way} gets at most {100 * target:g} % more of an image's pixels wrong than {last}, "
            "on average over images"
        ),
        outputs=MAPS,
    ),
}
"""The risks by the name that files and the command line use; no loss is above 1."""

RISKS_OF_SAMPLES = tuple(name for name in RISKS if RISKS[name].outputs is LABELS)
"""Names of the risks where a sample has one class."""


_OTHERS_RISK = {
    LABELS.name: (
        "The risk {risk} is for networks that say a class for every pixel. "
        f"This one says one for a sample: use one of {', '.join(RISKS_OF_SAMPLES)}."
    ),
    MAPS.name: (
        f"Where every pixel has a class, the risk must be {PIXEL_ERROR_GAP}, the mean over "
        "images of their wrong pixels: mean IoU is no mean over images, and nothing is "
        f"promised of it. Got {{risk!r}}: give max_risk=... and risk={PIXEL_ERROR_GAP!r}."
    ),
}
"""Why a risk is refused, by the outputs of those who asked for it."""


def cautious_losses(risk: str, logits: LabelledLogits) -> Floats:
    """Loss of each sample that is answered in each way, ties counted as the worse answer.

    Where two classes are equally likely but for rounding, processors differ in which they answer.
    A promise holds on each of them if such answers count as wrong, or as different.
    """
    counted = RISKS[risk]
    if counted.is_binary or counted.is_ternary:
        shifted_KNC = as_array(logits.logits_KNC).copy()
        of_last_N = shifted_KNC[-1].argmax(-1)
        named_N = as_array(logits.labels_N) if counted.counts_errors else of_last_N
        ahead_K1 = np.full((len(shifted_KNC), 1), -_TIE, dtype=shifted_KNC.dtype)
        if risk != "error":
            ahead_K1[-1] = _TIE
        shifted_KNC[:, np.arange(len(named_N)), named_N] += ahead_K1
        logits = replace(logits, logits_KNC=shifted_KNC, labels_N=as_array(logits.labels_N))
    return counted.losses(logits)


def check_risk(risk: str, max_risk: float, *, name: str = "max_risk") -> None:
    """Refuse a risk that there is not, or a target that is no fraction."""
    if risk not in RISKS:
        raise InvalidArgumentError(f"The risk must be one of {', '.join(RISKS)}. Got {risk!r}.")
    if not (isinstance(max_risk, Real) and 0 <= max_risk < 1):
        raise InvalidArgumentError(
            f"The {name!r} parameter must be a fraction in [0, 1). Got {max_risk!r}."
        )


def check_risk_fits(risk: str, logits: LabelledLogits) -> None:
    """Refuse a risk that these samples have not."""
    if RISKS[risk].outputs is not logits.outputs:
        raise InvalidArgumentError(_OTHERS_RISK[logits.outputs.name].format(risk=risk))


def binomial_p_value(losses_N: Floats, max_risk: float) -> float:
    """Exact p-value of "the risk is above the target" for losses that are 0 or 1.

    Reference: the binomial distribution; for a set number from each class, and fewer losses than
        one below the target's, Hoeffding (1956), On the distribution of the number of successes in
        independent trials.
    """
    return float(binom.cdf(np.ceil(losses_N.sum() - _ROUNDING), len(losses_N), max_risk))


def trinomial_p_value(
    losses_N: Floats, max_risk: float, *, delta: float, num_samples: int | None = None
) -> float:
    """P-value of "the risk is above the target" for losses that are -1, 0 or 1.

    The statistic is the number of 1s less a part of the number of -1s. Its chance of being so low
    is bounded for every share of -1s that these samples leave plausible, each with the least share
    of 1s at which the risk is above the target. Neither the order of the samples nor chance plays
    a part.

    Reference: Berger and Boos (1994), P values maximized over a confidence set for the nuisance
        parameter: here the share of -1s, in an exact interval that misses it with a chance of a
        fiftieth of ``delta``. The interval is cut into cells. Within one, more -1s and fewer 1s
        only make low statistics likelier, so that its upper end for the one and its lower end for
        the other bound the chance at every point of it.
    """
    n = num_samples or len(losses_N)
    lost = math.ceil(n * float((losses_N > 0.5).mean()) - _ROUNDING)
    gained = math.floor(n * float((losses_N < -0.5).mean()) + _ROUNDING)
    return _chance_of_so_few(lost, gained, n, max_risk, delta)


@lru_cache(maxsize=2**16)
def _chance_of_so_few(lost: int, gained: int, n: int, max_risk: float, delta: float) -> float:
    """The p-value for so many 1s and -1s among n samples."""
    part = _part_of_gains(n, max_risk, delta)
    missed = delta / 50
    low = float(betaincinv(gained, n - gained + 1, missed / 2)) if gained else 0.0
    high = float(betaincinv(gained + 1, n - gained, 1 - missed / 2)) if gained < n else 1.0
    edges = _cells(low, min(high, (1 - max_risk) / 2), n, max_risk)
    if len(edges) < 2:  # so many gains that the risk cannot be above the target
        return missed
    spread = 9 * math.sqrt(n * edges[-1]) + 9
    first, last = max(0, int(n * low - spread)), min(n, int(n * edges[-1] + spread))
    gained_J = np.arange(first, last + 1)
    most_J = np.floor(lost - part * (gained - gained_J) + _ROUNDING)
    gains_1, losses_1 = edges[1:, None], edges[:-1, None] + max_risk
    few_losses = bdtr(
        np.clip(most_J, 0, n - gained_J), n - gained_J, np.minimum(1, losses_1 / (1 - gains_1))
    )
    chances = binom.pmf(gained_J, n, gains_1) * np.where(most_J >= 0, few_losses, 0.0)
    return min(1.0, missed + float(chances.sum(axis=1).max()) + _ROUNDING)


def _part_of_gains(num_samples: int, max_risk: float, delta: float) -> float:
    """Weight of a -1 against a 1.

    Less than 1, since more of both make the sum vary more: then no share of -1s is much worse
    than the others. Any number in (0, 1] that is fixed before the samples are seen is valid.
    """
    slope = 1 + float(norm.ppf(delta)) / math.sqrt(2 * num_samples * max_risk)
    return min(1.0, max(0.5, slope))


def _cells(low: float, high: float, num_samples: int, max_risk: float) -> Floats:
    """Edges of cells that are narrow against the spread of the losses, from low to high."""
    edges = [low]
    while edges[-1] < high:
        width = 0.05 * math.sqrt((2 * edges[-1] + max_risk) / num_samples)
        edges.append(min(high, edges[-1] + width))
    return np.array(edges)


def hoeffding_bentkus_p_value(losses_N: Floats, max_risk: float) -> float:
    """P-value of "the risk is above the target" for losses in [0, 1].

    Reference: Bates et al. (2021), Distribution-free, risk-controlling prediction sets;
        Angelopoulos et al. (2021), Learn then Test.
    """
    num_samples, mean = len(losses_N), float(np.mean(losses_N))
    below = min(mean, max_risk)
    divergence = (below * math.log(below / max_risk) if below > 0 else 0.0) + (
        1 - below
    ) * math.log((1 - below) / (1 - max_risk))
    whole = np.ceil(losses_N.sum() - _ROUNDING)
    bentkus = math.e * float(binom.cdf(whole, num_samples, max_risk))
    return min(1.0, math.exp(-num_samples * divergence), bentkus)


def betting_p_value(
    losses_N: Floats,
    max_risk: float,
    *,
    delta: float,
    before: Floats,
    num_samples: int | None = None,
) -> float:
    """P-value of "the risk is above the target" for losses of at most 1, by betting on low ones.

    Capital 1 is staked: each sample multiplies it by ``1 + bet * (target - loss)``, the bet chosen
    by the samples before it. Were the risk above the target, nobody could expect to gain, so that
    the inverse of the most that the capital ever was is a p-value.

    Reference: Waudby-Smith and Ramdas (2024), Estimating means of bounded random variables by
        betting: predictable plug-in bets (their section 4), with Ville's inequality; the variance
            that sizes them is here the mean square less the squared mean of the samples so far.
    """
    seen = np.concatenate([before, losses_N])
    count = np.arange(1, len(seen) + 1)
    variance = (0.25 + np.cumsum(seen**2)) / (count + 1) - (np.cumsum(seen) / count) ** 2
    until_then_N = np.maximum(variance, 1 / (count + 1))[len(before) - 1 : -1]
    bets_N = _stakes(until_then_N, delta=delta, num_samples=num_samples or len(losses_N))
    log_capital_N = np.cumsum(np.log1p(bets_N * (max_risk - losses_N)))
    return math.exp(-max(0.0, float(log_capital_N.max())))


def fixed_bet_p_value(
    losses_N: Floats,
    max_risk: float,
    *,
    delta: float,
    before: Floats,
    highest: float = 1.0,
    num_samples: int | None = None,
) -> float:
    """The same where a set number is drawn from each class, weighted or not.

    The bet is the same for all samples, and only the final capital counts. So the order does not
    matter, and it is enough that the mean of what the samples lose on average is the risk: by the
    inequality of means, the capital then gains nothing on average.
    """
    variance = np.array(max(float(np.var(before)), 1 / len(before)))
    stake = _stakes(variance, delta=delta, num_samples=num_samples or len(losses_N))
    bet = min(float(stake), _LARGEST_STAKE / highest)
    log_capital = float(np.log1p(bet * (max_risk - losses_N)).sum())
    return math.exp(-max(0.0, log_capital))


def _stakes(variance: Floats, *, delta: float, num_samples: int) -> Floats:
    """Size bets that are best if the mean just suffices, and safe whatever comes.

    It does not depend on the target, so that a looser one never fails where a tighter one passes.
    """
    wanted: Floats = np.sqrt(2 * math.log(1 / delta) / (num_samples * variance))
    return np.minimum(wanted, _LARGEST_STAKE)


_LARGEST_STAKE = 0.9
"""Of the capital, what one sample may take at the most."""
