"""Accuracy and cost of a runner on labelled data.

Shapes: ``B`` batch, ``C`` classes, ``K`` exits, ``N`` samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.calibration.collect import ExitLogits
from offramp.errors import DataError, ShapeError
from offramp.inference.runner import Runner


@dataclass(frozen=True, kw_only=True)
class ExitEvaluation:
    """One exit.

    Attributes:
        index: Its number, from 0.
        accuracy: Over all samples at that exit, a fraction.
        share: Of the samples that left there, a fraction.
        macs: MACs of a sample that runs every head up to there.
    """

    index: int
    accuracy: float
    share: float
    macs: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a runner reached on a data set.

    Attributes:
        num_samples: How many samples were answered.
        accuracy: Of the adaptive network, a fraction.
        mean_macs: Mean MACs per sample that ran, heads counted.
        plain_macs: MACs per sample of the plain network.
        final_exit_accuracy: Of the final exit on every sample.
        plain_accuracy: Of a plain network trained as long; None where none was given.
        exits: Each exit's figures.
    """

    num_samples: int
    accuracy: float
    mean_macs: float
    plain_macs: int
    final_exit_accuracy: float
    plain_accuracy: float | None
    exits: tuple[ExitEvaluation, ...]

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON, under the keys of ``offramp evaluate --json``."""
        content = asdict(self)
        content["exits"] = list(content["exits"])
        return content


def evaluate(
    runner: Runner,
    loader: Iterable[tuple[Tensor, Tensor]],
    logits: ExitLogits,
    *,
    plain_accuracy: float | None = None,
) -> Evaluation:
    """Run every sample early and compare with what each exit alone would have said.

    Args:
        runner: Any runner.
        loader: Batches of (inputs, labels) on the runner's device.
        logits: Every exit's logits on the same samples in the same order, from ``collect``.
        plain_accuracy: Of a plain network trained as long, to stand beside the figures.
    Returns:
        The figures.
    Raises:
        DataError: If the loader yields no sample.
        ShapeError: If the loader and the logits hold different samples.
    """
    predictions, exits, macs, labels = [], [], [], []
    for inputs, labels_B in loader:
        result = runner.run(inputs)
        predictions.append(result.output.argmax(-1).cpu())
        exits.append(result.exit_index.cpu())
        macs.append(result.macs.cpu())
        labels.append(labels_B.cpu())
    if not labels:
        raise DataError("Expected at least one batch of samples to evaluate. Got none.")
    labels_N = torch.cat(labels)
    if not torch.equal(labels_N, logits.labels_N):
        raise ShapeError(
            "Expected the loader to yield the samples of the logits in the same order. "
            f"Got {len(labels_N)} samples against {len(logits.labels_N)}, or other labels."
        )
    costs = logits.costs
    share_K = torch.bincount(torch.cat(exits), minlength=costs.num_exits).double() / len(labels_N)
    accuracy_K = logits.correct_KN.double().mean(1).tolist()
    return Evaluation(
        num_samples=len(labels_N),
        accuracy=float((torch.cat(predictions) == labels_N).double().mean()),
        mean_macs=float(torch.cat(macs).double().mean()),
        plain_macs=costs.plain_macs,
        final_exit_accuracy=accuracy_K[-1],
        plain_accuracy=plain_accuracy,
        exits=tuple(
            ExitEvaluation(index=k, accuracy=accuracy, share=share, macs=exit_macs)
            for k, (accuracy, share, exit_macs) in enumerate(
                zip(accuracy_K, share_K.tolist(), costs.exit_macs(), strict=True)
            )
        ),
    )
