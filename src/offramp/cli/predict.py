"""``offramp predict``."""

from __future__ import annotations

import sys

from offramp.cli.options import Predict
from offramp.workflow.predict import predict as answer


def predict(asked: Predict) -> None:
    """Print what a run or a bundle says of samples."""
    predicted = answer(asked.run, asked.samples, asked.device, asked.network)
    if predicted.note is not None:
        print(predicted.note, file=sys.stderr)
    for sample, said in zip(asked.samples, predicted.answers, strict=True):
        print(f"{sample}: {said}")
