"""Metrics of probabilities: Brier score, reliability, and whether the sure are right.

Samples may have weights, in any unit: a weight of 2 counts as the sample given twice.

Shapes: ``N`` samples, ``C`` classes, ``M`` bins.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.measure.arrays import Floats, Numbers, as_array

Labels = npt.NDArray[np.int64]

_ROUNDING = 1e-6
"""Rounding at single precision may lead a probability so far out of [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Share of right answers, by how sure they are: a reliability diagram in numbers.

    Attributes:
        edges: Of the bins of the largest probability, M + 1 numbers from 0 to 1. A bin holds its
            upper edge and not its lower one; the first holds both.
        counts: Samples in each bin, as much as they weigh.
        confidence: Mean of the largest probability in each bin; None where the bin is empty.
        accuracy: Share of right answers in each bin; None where the bin is empty.
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]: how far accuracy is from confidence in the mean.

        Reference: Guo et al. (2017), On Calibration of Modern Neural Networks, equation 3.
        """
        gaps = (
            count * abs(accuracy - confidence)
            for count, accuracy, confidence in zip(
                self.counts, self.accuracy, self.confidence, strict=True
            )
            if accuracy is not None and confidence is not None
        )
        return sum(gaps) / sum(self.counts)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON, the expected calibration error among them."""
        return {"ece": self.ece, **asdict(self)}


def brier_score(p_NC: Numbers, labels_N: Numbers, weights_N: Numbers | None = None) -> float:
    """Mean squared distance of the probabilities from the truth; lower is better.

    Of each sample, the squares are summed over the classes: 0 is sure and right, 2 sure and wrong,
    and even odds on two classes give 1/2. Others take the mean over the classes, or one class
    of two, and get a half of this for two classes.

    Reference: Brier (1950), Verification of Forecasts Expressed in Terms of Probability, eq. 2.
    Example:
        >>> import torch
        >>> brier_score(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
        0.3125
    """
    p_NC64, labels = _checked_probabilities(p_NC, labels_N)
    weights = _checked_weights(weights_N, len(labels))
    truth_NC = np.eye(p_NC64.shape[1])[labels]
    return float(np.average(((p_NC64 - truth_NC) ** 2).sum(-1), weights=weights))


def reliability(
    p_NC: Numbers, labels_N: Numbers, weights_N: Numbers | None = None, num_bins: int = 15
) -> Reliability:
    """Compare how sure answers are with how often they are right.

    The answer is the class of the largest probability. The figures depend on the bins, and with
    few samples the expected calibration error is above 0 even where nothing is amiss.

    Reference: Guo et al. (2017), On Calibration of Modern Neural Networks, section 2; there a
        probability of 0 is in no bin, here in the first.
    Example:
        >>> import torch
        >>> p = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]])
        >>> found = reliability(p, torch.tensor([0, 1, 0]), num_bins=2)
        >>> found.counts, found.confidence, found.accuracy
        ((1.0, 2.0), (0.5, 0.75), (1.0, 0.5))
    """
    if num_bins < 1:
        raise InvalidArgumentError(
            f"The 'num_bins' parameter must be an int of at least 1. Got {num_bins}."
        )
    p_NC64, labels = _checked_probabilities(p_NC, labels_N)
    weights = _checked_weights(weights_N, len(labels))
    edges = np.linspace(0, 1, num_bins + 1)
    bin_N = (np.searchsorted(edges, p_NC64.max(-1), side="left") - 1).clip(0, num_bins - 1)
    counts_M = np.bincount(bin_N, weights, minlength=num_bins)

    def means(values_N: Floats) -> tuple[float | None, ...]:
        sums_M = np.bincount(bin_N, weights * values_N, minlength=num_bins)
        return tuple(
            float(total / count) if count > 0 else None
            for total, count in zip(sums_M, counts_M, strict=True)
        )

    return Reliability(
        edges=tuple(edges.tolist()),
        counts=tuple(counts_M.tolist()),
        confidence=means(p_NC64.max(-1)),
        accuracy=means((p_NC64.argmax(-1) == labels).astype(np.float64)),
    )


def auroc(
    confidence_N: Numbers, correct_N: Numbers, weights_N: Numbers | None = None
) -> float | None:
    """Measure how well confidence tells right answers from wrong ones, whatever its scale.

    The probability that a right answer is surer than a wrong one, equally sure ones counting half:
    1 where a threshold parts them, 1/2 where confidence says nothing.

    Reference: Hendrycks and Gimpel (2017), A Baseline for Detecting Misclassified and
        Out-of-Distribution Examples, section 2.
    Example:
        >>> import torch
        >>> auroc(torch.tensor([0.9, 0.6, 0.7]), torch.tensor([True, True, False]))
        0.5
    """
    if confidence_N.ndim != 1 or confidence_N.shape != correct_N.shape:
        raise ShapeError(
            "Expected confidences and right or wrong of one shape (N,). "
            f"Got {tuple(confidence_N.shape)} and {tuple(correct_N.shape)}."
        )
    confidence = _float64(confidence_N)
    if ((confidence < -_ROUNDING) | (confidence > 1 + _ROUNDING)).any():
        raise InvalidArgumentError(
            f"A confidence must be in [0, 1], or NaN. Got from {np.nanmin(confidence):g} to "
            f"{np.nanmax(confidence):g}: give confidences, not logits."
        )
    weights = _checked_weights(weights_N, len(confidence))
    correct = as_array(correct_N).astype(bool)
    if len(np.unique(correct[weights > 0])) < 2:
        return None
    surest_last = np.nan_to_num(confidence, nan=-1.0)
    right, wrong = np.where(correct, weights, 0.0), np.where(correct, 0.0, weights)
    _, level_N = np.unique(surest_last, return_inverse=True)
    right_L, wrong_L = np.bincount(level_N, right), np.bincount(level_N, wrong)
    beaten_L = np.cumsum(wrong_L) - wrong_L / 2
    return float(right_L @ beaten_L / (right_L.sum() * wrong_L.sum()))


def _checked_probabilities(p_NC: Numbers, labels_N: Numbers) -> tuple[Floats, Labels]:
    if p_NC.ndim != 2 or labels_N.shape != p_NC.shape[:1]:
        raise ShapeError(
            "Expected probabilities of shape (N, C) and labels of shape (N,). "
            f"Got {tuple(p_NC.shape)} and {tuple(labels_N.shape)}."
        )
    p, labels = _float64(p_NC), as_array(labels_N).astype(np.int64)
    # Half precision sums to 1 to about two digits.
    is_in_range_N = ((p >= -_ROUNDING) & (p <= 1 + _ROUNDING)).all(-1)
    is_distribution_N = is_in_range_N & (abs(p.sum(-1) - 1) < 1e-2)
    if not is_distribution_N.all():
        row = int(is_distribution_N.argmin())
        raise InvalidArgumentError(
            "Expected probabilities in [0, 1] that sum to 1 in each row. Got row "
            f"{row} from {p[row].min():g} to {p[row].max():g} with sum {p[row].sum():g}: give "
            "probabilities, not logits, and leave out rows with NaN."
        )
    if ((labels < 0) | (labels >= p.shape[1])).any():
        raise InvalidArgumentError(
            f"A label must be an int in [0, {p.shape[1] - 1}], one of {p.shape[1]} classes. "
            f"Got from {labels.min()} to {labels.max()}."
        )
    return p, labels


def _checked_weights(weights_N: Numbers | None, num_samples: int) -> Floats:
    weights = np.ones(num_samples) if weights_N is None else _float64(weights_N)
    if weights.shape != (num_samples,):
        raise ShapeError(
            f"Expected weights of shape ({num_samples},), one per sample. Got {weights.shape}."
        )
    if not ((weights >= 0) & np.isfinite(weights)).all():
        raise InvalidArgumentError(
            "A weight must be finite and not negative. "
            f"Got from {weights.min():g} to {weights.max():g}."
        )
    if not weights.sum() > 0:
        raise InvalidArgumentError(
            f"Expected at least one sample of positive weight. Got {num_samples} samples, none."
        )
    return weights


def _float64(values: Numbers) -> Floats:
    array: Floats = as_array(values).astype(np.float64)
    return array
