"""The drop that early exit reached on a data set, with the interval that the samples allow.

Shapes: ``N`` samples, ``C`` classes, ``R`` resamples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.calibration.asked import Asked
from offramp.calibration.labelled import LabelledLogits
from offramp.calibration.logits import ExitLogits
from offramp.calibration.risk import PIXEL_ERROR_GAP, RISKS
from offramp.measure.arrays import as_array
from offramp.measure.dense import mean_iou, pixel_accuracy
from offramp.measure.intervals import (
    Interval,
    difference_interval,
    interval_of,
    mean_interval,
    resampled_means,
    share_interval,
)
from offramp.measure.outputs import LABELS, MAPS

if TYPE_CHECKING:
    import torch

    from offramp.evaluation.evaluate import Answers


def paired_drop(answers: Answers, logits: ExitLogits) -> Interval:
    """Measure what is lost against the final exit on the same samples."""
    return _DROPS[logits.outputs.name](answers, logits)


def _drop_of_maps(answers: Answers, logits: Any) -> Interval:
    import torch

    both_N2CC = torch.stack([logits.confusion_KNCC[-1], answers.confusion_NCC], 1)
    size = both_N2CC.shape[1:]
    drops = [
        _lost(torch.from_numpy(means_RD).reshape(-1, *size))
        for means_RD in resampled_means(both_N2CC.flatten(1).numpy())
    ]
    value = _lost(both_N2CC.double().mean(0, keepdim=True))
    return interval_of(float(value[0]), torch.cat(drops).numpy())


def _drop_of_labels(answers: Answers, logits: Any) -> Interval:
    right_N = answers.predictions_N == answers.labels_N
    final_N = as_array(logits.correct_KN[-1])
    more, less = int((final_N & ~right_N).sum()), int((right_N & ~final_N).sum())
    return difference_interval(more, less, len(right_N))


_DROPS = {LABELS.name: _drop_of_labels, MAPS.name: _drop_of_maps}


def _lost(confusion_R2CC: torch.Tensor) -> torch.Tensor:
    final_R, adaptive_R = mean_iou(confusion_R2CC).unbind(1)
    return final_R - adaptive_R


def reached(
    asked: Asked, answers: Answers, logits: ExitLogits, *, drop: Interval
) -> Interval | None:
    """Measure what a policy was asked for."""
    if asked.target == "max_drop":
        return drop
    if asked.target in ("budget_macs", "budget_share"):
        return mean_interval(answers.macs_N.astype(np.float64) / logits.costs.plain_macs)
    if asked.target == "max_risk" and asked.risk in RISKS:
        return _risk(asked.risk, answers, logits, drop=drop)
    return None


def _risk(risk: str, answers: Answers, logits: ExitLogits, *, drop: Interval) -> Interval | None:
    if risk == PIXEL_ERROR_GAP:
        right_N: Any = pixel_accuracy(answers.confusion_NCC)
        return mean_interval(as_array(logits.correct_KN[-1] - right_N))
    if answers.output_NC is None:
        return None
    if risk == "accuracy_gap":
        return drop
    both = LabelledLogits(
        logits_KNC=np.stack([answers.output_NC, as_array(logits.logits_KNC)[-1]]).astype(
            np.float32
        ),
        labels_N=as_array(logits.labels_N),
    )
    losses_N = RISKS[risk].losses(both)[0]
    if RISKS[risk].is_binary:
        return share_interval(int(np.rint(losses_N.sum())), len(losses_N))
    return mean_interval(losses_N)
