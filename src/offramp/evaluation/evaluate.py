"""Accuracy and cost of a runner on labelled data.

Shapes: ``B`` batch, ``C`` classes, ``K`` exits, ``N`` samples, ``G`` gates, ``L`` layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from offramp.calibration.asked import Asked
from offramp.calibration.bundles import logits_of_batches
from offramp.calibration.latency import LatencyCalibration
from offramp.calibration.logits import ExitLogits
from offramp.data.arrays import in_arrays
from offramp.data.labels import check_labels
from offramp.errors import DataError, InvalidArgumentError, ShapeError
from offramp.evaluation.asked_and_got import paired_drop, reached
from offramp.evaluation.figures import (
    BlocksEvaluation,
    Evaluation,
    ExitEvaluation,
    Rival,
    TokensEvaluation,
)
from offramp.measure.arrays import as_array
from offramp.measure.dense import confusion_matrices, mean_iou, pixel_accuracy
from offramp.measure.outputs import outputs_of
from offramp.policy.choice import Choice
from offramp.policy.policies import Policy
from offramp.policy.routing_policy import RoutingPolicy
from offramp.results import AdaptiveResult
from offramp.runtime import Session
from offramp.runtime.answers import token_depths

if TYPE_CHECKING:  # bundles are evaluated without torch
    from torch import Tensor

    from offramp.families.agreement import Runner
    from offramp.zoo import Network

__all__ = [
    "Answers",
    "BlocksEvaluation",
    "Evaluation",
    "ExitEvaluation",
    "Rival",
    "TokensEvaluation",
    "answer",
    "evaluate",
    "predicted",
]

Array = npt.NDArray[Any]
Chosen = Policy | RoutingPolicy | Choice | None
"""A policy, or what chose one."""


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
        if self.labels_N.ndim > 1:
            return float(pixel_accuracy(self.confusion_NCC.sum(0)))
        return float((self.predictions_N == self.labels_N).mean())

    @property
    def mean_iou(self) -> float | None:
        """Mean intersection over union; None where a sample has one class."""
        return float(mean_iou(self.confusion_NCC.sum(0))) if self.labels_N.ndim > 1 else None

    @property
    def confusion_NCC(self) -> Tensor:
        """Pixels of each image by true and predicted class, shape (N, C, C), int64."""
        import torch

        classes = map(torch.from_numpy, (self.predictions_N, self.labels_N))
        return confusion_matrices(*classes, num_classes=self.num_classes)

    @property
    def mean_macs(self) -> float:
        """Mean MACs per sample."""
        return float(self.macs_N.mean(dtype=np.float64))

    def shares(self, num_exits: int) -> tuple[float, ...]:
        """Share of the samples that left by each exit."""
        counts_K = np.bincount(self.exit_index_N, minlength=num_exits)
        return tuple((counts_K / len(self.labels_N)).tolist())


def answer(runner: Runner, loader: Iterable[tuple[Any, Tensor]]) -> Answers:
    """Run every sample of a loader."""
    gathered = _Gathered()
    for _ in gathered.answering(runner, loader):
        pass
    return gathered.answers()


@dataclass
class _Gathered:
    """Yield the answers of a runner, batch after batch."""

    results: list[AdaptiveResult[Array]] = field(default_factory=list)
    predictions: list[Array] = field(default_factory=list)
    labels: list[Array] = field(default_factory=list)

    def answering(self, runner: Runner, loader: Any) -> Iterator[tuple[Any, Any]]:
        """Run each batch and hand it on, so that one pass serves what comes after too."""
        batches = in_arrays(loader) if isinstance(runner, Session) else _in_tensors(runner, loader)
        for inputs, labels_B in batches:
            result = runner.run(*inputs)
            output = result.output
            check_labels(labels_B, num_classes=output.shape[1])
            self.predictions.append(as_array(predicted(output, labels_B)))
            self.labels.append(as_array(labels_B).astype(self.predictions[-1].dtype))
            # Maps of logits are large, and only their classes count.
            kept = output if output.ndim == 2 else output[:, :, :0, :0]
            parts: dict[str, Any] = {
                name: None if part is None else as_array(part)
                for name, part in {**vars(result), "output": kept}.items()
            }
            self.results.append(AdaptiveResult(**parts))
            yield inputs, labels_B

    def answers(self) -> Answers:
        """All of it."""
        if not self.labels:
            raise DataError("Expected at least one batch of samples to evaluate. Got none.")

        def joined(name: str) -> Any:
            parts = [getattr(result, name) for result in self.results]
            return None if parts[0] is None else np.concatenate(parts)

        output = joined("output")
        return Answers(
            predictions_N=np.concatenate(self.predictions),
            exit_index_N=joined("exit_index"),
            macs_N=joined("macs"),
            labels_N=np.concatenate(self.labels),
            num_classes=output.shape[1],
            output_NC=output if output.ndim == 2 else None,
            blocks_NG=joined("blocks"),
            tokens_NL=joined("tokens"),
        )


def _in_tensors(runner: Any, loader: Any) -> Iterator[tuple[Any, Any]]:
    """Batches as a runner in torch takes them."""
    from offramp.data.batches import batches_of, read_batch
    from offramp.families.family import TorchRunner

    network = runner.network if isinstance(runner, TorchRunner) else None
    device = None if network is None else next((p.device for p in network.parameters()), None)
    for batch in batches_of(loader):
        yield read_batch(batch, network, device=device)


def predicted(output: Any, labels_B: Any) -> Any:
    """The classes that logits say, for each sample or each pixel, as the labels are."""
    if output.ndim == 4 and isinstance(output, np.ndarray):
        import torch

        output = torch.from_numpy(output)
    return outputs_of(output).predict(output, labels_B)


@overload
def evaluate(
    runner: Runner,
    loader: Iterable[tuple[Any, Tensor]],
    logits: ExitLogits | None = None,
    *,
    asked: Asked | None = None,
    plain_accuracy: float | None = None,
    plain_mean_iou: float | None = None,
) -> Evaluation: ...


@overload
def evaluate(
    runner: Network,
    loader: Chosen,
    logits: Iterable[tuple[Any, Tensor]],
    *,
    asked: Asked | None = None,
    plain_accuracy: float | None = None,
    plain_mean_iou: float | None = None,
) -> Evaluation: ...


def evaluate(
    runner: Any,
    loader: Any,
    logits: Any = None,
    *,
    asked: Asked | None = None,
    plain_accuracy: float | None = None,
    plain_mean_iou: float | None = None,
) -> Evaluation:
    """Run every sample early, and compare with what each exit alone would have said.

    Call it as ``evaluate(network, policy, data)``, where the policy may be what a calibration
    chose, or as ``evaluate(runner, data)``; where every exit's logits on the same samples are at
    hand, as ``evaluate(runner, data, logits)``.

    Args:
        runner: Any runner, or a network.
        loader: Batches of (inputs, labels); inputs is a tuple where the network takes several.
            Behind a network, its policy or a calibration.
        logits: Every exit's logits on the same samples in the same order, from ``collect``, or
            ``collect_from_session`` for a bundle; collected in the same pass if None. Behind a
            network and its policy, the batches.
        asked: What the policy was asked for, to stand beside what came; a calibration says it.
        plain_accuracy: Of a plain network trained as long, to stand beside the figures.
        plain_mean_iou: Its mean IoU, where every pixel has a class.
    Returns:
        The figures; print them for a table.
    Raises:
        DataError: If there is no sample.
        InvalidArgumentError: If there are no batches behind a network and its policy, or no logits
            beside a runner of your own.
        NotCalibratedError: If the policy is None or of another network.
        ShapeError: If the batches and the logits hold different samples.
    """
    if not isinstance(runner, Session) and _is_network(runner):
        from offramp.families import make_runner

        if logits is None:
            raise InvalidArgumentError(
                "Expected evaluate(network, policy, data), or evaluate(runner, data). Got a "
                f"{type(runner).__name__} and nothing behind its policy or data."
            )
        network, chosen = runner, loader
        asked = asked or _asked_of(chosen)
        runner, loader, logits = make_runner(network, chosen), logits, None
    if logits is None:
        gathered = _Gathered()
        batches = gathered.answering(runner, loader)
        if isinstance(runner, Session):
            logits = logits_of_batches(runner, batches)
        else:
            logits = _collect(runner, batches)
        answers = gathered.answers()
    else:
        answers = answer(runner, loader)
    return _compare(
        answers,
        logits,
        asked=asked,
        plain_accuracy=plain_accuracy,
        plain_mean_iou=plain_mean_iou,
    )


def _is_network(runner: Any) -> bool:
    from torch import nn

    return isinstance(runner, nn.Module)


def _collect(runner: Any, batches: Iterable[Any]) -> ExitLogits:
    """Collect the logits of every exit from the network of a runner."""
    from offramp.calibration.collect import collect
    from offramp.families.family import TorchRunner

    if not isinstance(runner, TorchRunner):
        raise InvalidArgumentError(
            "Expected every exit's logits beside a runner of your own: evaluate(runner, data, "
            "logits)."
        )
    return collect(runner.network, batches)


def _asked_of(chosen: Any) -> Asked | None:
    """The target of a calibration; None for a policy."""
    chosen = chosen.chosen if isinstance(chosen, LatencyCalibration) else chosen
    promise = getattr(chosen, "guarantee", None)
    if promise is None:
        return getattr(chosen, "asked", None)
    return Asked(
        target="max_risk",
        limit=promise.max_risk,
        num_samples=promise.num_samples,
        risk=promise.risk,
        guarantee="mean" if promise.probability is None else promise.probability,
    )


def _compare(
    answers: Answers, logits: ExitLogits, *, asked: Asked | None, **plain: float | None
) -> Evaluation:
    if not np.array_equal(answers.labels_N, as_array(logits.labels_N)):
        raise ShapeError(
            "Expected the loader to yield the samples of the logits in the same order. "
            f"Got {len(answers.labels_N)} samples against {len(logits.labels_N)}, or other labels."
        )
    macs = dict(zip(logits.numbers, logits.costs.exit_macs(), strict=True))
    for k in np.unique(answers.exit_index_N).tolist():
        of_exit = answers.macs_N[answers.exit_index_N == k]
        macs[k] = round(float(of_exit.mean(dtype=np.float64)))
    shares = answers.shares(logits.numbers[-1] + 1)
    everybody = np.ones(len(answers.labels_N), dtype=np.int64)
    alone = [logits.figures(k * everybody) for k in range(logits.costs.num_exits)]
    drop = paired_drop(answers, logits)
    return Evaluation(
        num_samples=len(answers.labels_N),
        accuracy=answers.accuracy,
        mean_macs=answers.mean_macs,
        plain_macs=logits.costs.plain_macs,
        final_exit_accuracy=alone[-1].accuracy,
        exits=tuple(
            ExitEvaluation(index=k, share=shares[k], macs=macs[k], **vars(figures))
            for k, figures in zip(logits.numbers, alone, strict=True)
        ),
        blocks=_describe_blocks(answers, plain_macs=logits.costs.plain_macs),
        tokens=_describe_tokens(answers, plain_macs=logits.costs.plain_macs),
        mean_iou=answers.mean_iou,
        final_exit_mean_iou=alone[-1].mean_iou,
        drop=drop,
        asked=asked,
        got=None if asked is None else reached(asked, answers, logits, drop=drop),
        **plain,  # type: ignore[arg-type]
    )


def _describe_blocks(answers: Answers, *, plain_macs: int) -> BlocksEvaluation | None:
    if answers.blocks_NG is None:
        return None
    run_rates_G = answers.blocks_NG.mean(0, dtype=np.float64)
    return BlocksEvaluation(
        run_rates=tuple(run_rates_G.tolist()),
        saved=1 - float(run_rates_G.mean()),
        macs_saved=1 - answers.mean_macs / plain_macs,
    )


def _describe_tokens(answers: Answers, *, plain_macs: int) -> TokensEvaluation | None:
    if answers.tokens_NL is None:
        return None
    tokens_NL = answers.tokens_NL.astype(np.float64)
    return TokensEvaluation(
        per_layer=tuple(tokens_NL.mean(0).tolist()),
        mean_depth=float(np.average(token_depths(tokens_NL), weights=tokens_NL[:, 0])),
        macs_saved=1 - answers.mean_macs / plain_macs,
    )
