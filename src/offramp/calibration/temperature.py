"""Temperatures: numbers that divide an exit's logits, so that its probabilities can be trusted.

A network is often surer than it is right. A temperature above 1 tempers an exit, one below 1 makes
it surer; which class an exit predicts stays the same. Each exit has its own, fitted on held-out
data. Deep exits meet only the samples that no exit before them was sure of: fitted on all samples,
they would be right about a population that they never see.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from offramp.calibration.evidence import require_evidence
from offramp.calibration.search import Floats, exits_left_by
from offramp.errors import InvalidArgumentError, ShapeError
from offramp.measure.arrays import softmax
from offramp.measure.metrics import Reliability, auroc, brier_score, reliability

if TYPE_CHECKING:
    from offramp.calibration.logits import ExitLogits

BoolArray = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int64]

_LOWEST, _HIGHEST = 0.05, 20.0
"""Temperatures that are searched lie between these."""


@dataclass(frozen=True, kw_only=True)
class ExitCalibration:
    """Effect of a temperature on one exit.

    Before is at temperature 1. The figures are None where the exit has no sample.

    Attributes:
        index: The exit's number in the network, from 0.
        temperature: Divides the exit's logits.
        num_samples: How many samples the figures are about.
        brier_before: Brier score, in [0, 2].
        brier_after: The same with the temperature.
        auroc: Of the largest probability, with the temperature, against right or wrong; None too
            where the exit is right about all samples, or wrong.
        reliability_before: Confidence and accuracy in bins.
        reliability_after: The same with the temperature.
    """

    index: int
    temperature: float
    num_samples: int
    brier_before: float | None = None
    brier_after: float | None = None
    auroc: float | None = None
    reliability_before: Reliability | None = None
    reliability_after: Reliability | None = None

    @property
    def ece_before(self) -> float | None:
        """Expected calibration error, in [0, 1]."""
        return None if self.reliability_before is None else self.reliability_before.ece

    @property
    def ece_after(self) -> float | None:
        """The same with the temperature."""
        return None if self.reliability_after is None else self.reliability_after.ece

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON."""
        before, after = self.reliability_before, self.reliability_after
        return asdict(self) | {
            "ece_before": self.ece_before,
            "ece_after": self.ece_after,
            "reliability_before": None if before is None else before.to_dict(),
            "reliability_after": None if after is None else after.to_dict(),
        }


def fit_temperatures(
    logits: ExitLogits, *, reached_KN: BoolArray | None = None
) -> tuple[float, ...]:
    """Choose each exit's temperature by the labels of held-out data.

    The temperature at which the labels are likeliest: that of the least mean cross entropy, each
    sample counting as much as it weighs. It lies in [0.05, 20] and stays at the bound where the
    labels would drive it further: an exit that is right about all samples gets 0.05, one that is
    wrong about all of them 20. Neither is then a finding about more samples: give more.

    Samples whose logits hold NaN are left out, and those whose label has a logit of -inf, which
    is impossible at any temperature.

    Args:
        logits: Every exit's logits on held-out data.
        reached_KN: Which samples reach each exit, shape (K, N), from :func:`reached`; all if None.
    Returns:
        One temperature per exit; 1 where fewer than two samples are left to fit it on, or every
        temperature is as good.
    Raises:
        ShapeError: If ``reached_KN`` is not of shape (K, N).
    Reference: Guo et al. (2017), On Calibration of Modern Neural Networks, section 4.2; there for
        the one exit of a network, and all samples.
    Example:
        >>> import torch
        >>> from offramp import ExitCosts, ExitLogits
        >>> logits = ExitLogits(  # sure of class 0, which is right three times in four: odds of 3
        ...     logits_KNC=torch.tensor([[[2 * math.log(3), 0.0]] * 4]),
        ...     labels_N=torch.tensor([0, 0, 1, 0]),
        ...     costs=ExitCosts(stage_macs=(1,), head_macs=(1,)),
        ... )
        >>> [round(temperature, 3) for temperature in fit_temperatures(logits)]
        [2.0]
    """
    require_evidence(logits)
    _check_reached(logits, reached_KN)
    exits = range(logits.costs.num_exits)
    return tuple(fit_temperature(logits, k, reached_KN=reached_KN) for k in exits)


def fit_temperature(
    logits: ExitLogits, exit_index: int, *, reached_KN: BoolArray | None = None
) -> float:
    """Choose the temperature of one exit, as :func:`fit_temperatures` does for all."""
    return _fit(*_samples_of(logits, exit_index, reached_KN))


def reached(confidence_KN: Floats, thresholds: Sequence[float]) -> BoolArray:
    """Find the samples that reach each exit: those that left by no exit before it.

    Example:
        >>> reached(np.array([[0.9, 0.4], [0.8, 0.8]]), (0.5,)).tolist()
        [[True, True], [False, True]]
    """
    num_exits = len(confidence_KN)
    if len(thresholds) != num_exits - 1:
        raise ShapeError(
            f"Expected {num_exits - 1} thresholds, one per exit but the final one. "
            f"Got {len(thresholds)}."
        )
    exits_K1 = np.arange(num_exits)[:, None]
    is_reached_KN: BoolArray = exits_left_by(confidence_KN, thresholds) >= exits_K1
    return is_reached_KN


def describe_temperatures(
    logits: ExitLogits, temperatures: Sequence[float], *, reached_KN: BoolArray | None = None
) -> tuple[ExitCalibration, ...]:
    """Measure what temperatures do to each exit's probabilities.

    On the data that chose the temperatures, the figures are a little better than on new data.
    Samples whose logits hold NaN are left out.
    """
    num_exits = logits.costs.num_exits
    if len(temperatures) != num_exits or not all(0 < t < math.inf for t in temperatures):
        raise InvalidArgumentError(
            f"The 'temperatures' parameter must hold {num_exits} positive numbers, one per exit. "
            f"Got {tuple(temperatures)}."
        )
    _check_reached(logits, reached_KN)
    return tuple(
        _describe(logits.numbers[k], float(t), *_samples_of(logits, k, reached_KN))
        for k, t in enumerate(temperatures)
    )


def _check_reached(logits: ExitLogits, reached_KN: BoolArray | None) -> None:
    expected = tuple(logits.logits_KNC.shape[:2])
    if reached_KN is not None and reached_KN.shape != expected:
        raise ShapeError(
            f"The 'reached_KN' parameter must be of shape {expected}, one row per exit and one "
            f"column per sample. Got {reached_KN.shape}."
        )


def _samples_of(
    logits: ExitLogits, exit_index: int, reached_KN: BoolArray | None
) -> tuple[Floats, Labels, Floats]:
    """Logits, labels and weights of the samples that count at an exit.

    The largest logit is taken from all of a sample, so that its probabilities stay the same and no
    exponential overflows.
    """
    logits_NC, labels_N, sample_N = logits.samples_at(exit_index)
    with np.errstate(invalid="ignore"):  # infinite logits say NaN
        logits_NC = logits_NC - logits_NC.max(-1, keepdims=True)
    weights_N = logits.weights_N[sample_N]
    counts_N = (weights_N > 0) & ~np.isnan(logits_NC).any(-1)
    if reached_KN is not None:
        counts_N &= reached_KN[exit_index][sample_N]
    return logits_NC[counts_N], labels_N[counts_N], weights_N[counts_N]


def _fit(logits_NC: Floats, labels_N: Labels, weights_N: Floats) -> float:
    of_label_N = logits_NC[np.arange(len(labels_N)), labels_N]
    is_possible_N = np.isfinite(of_label_N)
    if is_possible_N.sum() < 2:
        return 1.0
    logits_NC, of_label_N = logits_NC[is_possible_N], of_label_N[is_possible_N]
    shares_N = weights_N[is_possible_N] / weights_N[is_possible_N].sum()

    def loss(temperature: float) -> float:
        log_sum_N = np.log(np.exp(logits_NC / temperature).sum(-1))
        return float((log_sum_N - of_label_N / temperature) @ shares_N)

    # The loss is convex in 1 / temperature: on any scale it falls, then rises.
    inside = minimize_scalar(
        lambda log_temperature: loss(math.exp(log_temperature)),
        bounds=(math.log(_LOWEST), math.log(_HIGHEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    losses = {t: loss(t) for t in (_LOWEST, math.exp(inside.x), _HIGHEST)}
    if len(set(losses.values())) == 1:
        return 1.0
    return min(losses, key=losses.__getitem__)


def _describe(
    index: int, temperature: float, logits_NC: Floats, labels_N: Labels, weights_N: Floats
) -> ExitCalibration:
    if not len(labels_N):
        return ExitCalibration(index=index, temperature=temperature, num_samples=0)
    before_NC, after_NC = softmax(logits_NC), softmax(logits_NC / temperature)
    is_right_N = logits_NC.argmax(-1) == labels_N
    return ExitCalibration(
        index=index,
        temperature=temperature,
        num_samples=len(labels_N),
        brier_before=brier_score(before_NC, labels_N, weights_N),
        brier_after=brier_score(after_NC, labels_N, weights_N),
        auroc=auroc(after_NC.max(-1), is_right_N, weights_N),
        reliability_before=reliability(before_NC, labels_N, weights_N),
        reliability_after=reliability(after_NC, labels_N, weights_N),
    )
