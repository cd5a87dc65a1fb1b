"""The drop that early exit reached on a data set, with the interval that the samples allow.

Shapes: ``N`` samples, ``C`` classes, ``R`` resamples.
"""

from __future__ import annotations

import numpy as np

from offramp.calibration.asked import Asked
from offramp.calibration.labelled import LabelledLogits
from offramp.calibration.logits import ExitLogits
from offramp.calibration.risk import PIXEL_ERROR_GAP, RISKS
from offramp.evaluation.answers import Answers
from offramp.measure.arrays import as_array
from offramp.measure.intervals import (
    Interval,
    mean_interval,
    share_interval,
)


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
        return mean_interval(as_array(logits.correct_KN)[-1] - answers.right_N)
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
