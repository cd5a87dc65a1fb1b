"""Answers of a runner with a class for every pixel, which torch counts.

Shapes: ``N`` samples, ``C`` classes, ``R`` resamples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offramp.evaluation.answers import Answers, Array
from offramp.measure.dense import confusion_matrices, mean_iou, pixel_accuracy
from offramp.measure.intervals import Interval, interval_of, resampled_means


class MapAnswers(Answers):
    """Maps of classes, and what they are worth."""

    @property
    def accuracy(self) -> float:
        """Share of right pixels, of those whose class is known."""
        return float(pixel_accuracy(self.confusion_NCC.sum(0)))

    @property
    def mean_iou(self) -> float:
        """Mean intersection over union."""
        return float(mean_iou(self.confusion_NCC.sum(0)))

    @property
    def confusion_NCC(self) -> Tensor:
        """Pixels of each image by true and predicted class, shape (N, C, C), int64."""
        classes = map(torch.from_numpy, (self.predictions_N, self.labels_N))
        return confusion_matrices(*classes, num_classes=self.num_classes)

    @property
    def right_N(self) -> Array:
        """Share of each image's known pixels that are right."""
        return pixel_accuracy(self.confusion_NCC).numpy()

    def drop(self, logits: Any) -> Interval:
        """Measure the mean IoU that is lost against the final exit on the same images."""
        both_N2CC = torch.stack([logits.confusion_KNCC[-1], self.confusion_NCC], 1)
        size = both_N2CC.shape[1:]
        drops = [
            _lost(torch.from_numpy(means_RD).reshape(-1, *size))
            for means_RD in resampled_means(both_N2CC.flatten(1).numpy())
        ]
        value = _lost(both_N2CC.double().mean(0, keepdim=True))
        return interval_of(float(value[0]), torch.cat(drops).numpy())


def _lost(confusion_R2CC: Tensor) -> Tensor:
    final_R, adaptive_R = mean_iou(confusion_R2CC).unbind(1)
    return final_R - adaptive_R
