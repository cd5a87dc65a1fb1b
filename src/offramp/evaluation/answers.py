"""Answers of a runner to every sample of a data set, one class each.

Shapes: ``N`` samples, ``C`` classes, ``G`` gates, ``L`` layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.measure.arrays import as_array
from offramp.measure.intervals import Interval, difference_interval

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers of a runner to every sample of a loader.

    Attributes:
        predictions_N: Predicted classes, shape (N,), int64; of each pixel, shape (N, H, W), uint8,
            where the labels are masks.
        exit_index_N: Exits the samples left by, shape (N,), int64.
        macs_N: MACs that ran for each, shape (N,), int64.
        labels_N: True classes, shape (N,), int64; of each pixel, shape (N, H, W), uint8.
        num_classes: Classes that could be predicted.
        output_NC: Raw logits, shape (N, C); None where the labels are masks.
        blocks_NG: Gated blocks that ran, shape (N, G), bool; None where blocks are not skipped.
        tokens_NL: Tokens that ran each layer, shape (N, L), int64; None where they do not halt.
    """

    predictions_N: Array
    exit_index_N: Array
    macs_N: Array
    labels_N: Array
    num_classes: int
    output_NC: Array | None = None
    blocks_NG: Array | None = None
    tokens_NL: Array | None = None

    @property
    def accuracy(self) -> float:
        """Share of right predictions; of pixels whose class is known, where each has one."""
        return float(self.right_N.mean())

    @property
    def mean_iou(self) -> float | None:
        """Mean intersection over union; None where a sample has one class."""
        return None

    @property
    def right_N(self) -> Array:
        """Shares of each sample that are right: of one class, all or nothing."""
        return np.equal(self.predictions_N, self.labels_N)

    def drop(self, logits: Any) -> Interval:
        """Measure what is lost against the final exit on the same samples."""
        right_N, final_N = self.right_N, as_array(logits.correct_KN[-1])
        more, less = int((final_N & ~right_N).sum()), int((right_N & ~final_N).sum())
        return difference_interval(more, less, len(right_N))

    @property
    def mean_macs(self) -> float:
        """Mean MACs per sample."""
        return float(self.macs_N.mean(dtype=np.float64))

    def shares(self, num_exits: int) -> tuple[float, ...]:
        """Share of the samples that left by each exit."""
        counts_K = np.bincount(self.exit_index_N, minlength=num_exits)
        return tuple((counts_K / len(self.labels_N)).tolist())
