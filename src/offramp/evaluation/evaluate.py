"""Accuracy and cost of a runner on labelled data.

Shapes: ``B`` batch, ``C`` classes, ``K`` exits, ``N`` samples, ``G`` gates, ``L`` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from offramp.calibration.asked import Asked
from offramp.calibration.bundles import logits_of_batches
from offramp.calibration.latency import LatencyCalibration
from offramp.calibration.logits import ExitLogits
from offramp.data.arrays import in_arrays
from offramp.data.label_range import check_labels
from offramp.errors import DataError, InvalidArgumentError, ShapeError
from offramp.evaluation.answers import Answers, Array
from offramp.evaluation.asked_and_got import reached
from offramp.evaluation.figures import (
    BlocksEvaluation,
    Evaluation,
    ExitEvaluation,
    Rival,
    TokensEvaluation,
)
from offramp.measure.arrays import as_array
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

Chosen = Policy | RoutingPolicy | Choice | None
"""A policy, or what chose one."""


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
        if isinstance(runner, Session):
            batches = in_arrays(loader)
        else:
            from offramp.evaluation.networks import in_tensors

            batches = in_tensors(runner, loader)
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

        output, predictions_N = joined("output"), np.concatenate(self.predictions)
        kind = Answers
        if predictions_N.ndim > 1:
            from offramp.evaluation.map_answers import MapAnswers  # torch

            kind = MapAnswers
        return kind(
            predictions_N=predictions_N,
            exit_index_N=joined("exit_index"),
            macs_N=joined("macs"),
            labels_N=np.concatenate(self.labels),
            num_classes=output.shape[1],
            output_NC=output if output.ndim == 2 else None,
            blocks_NG=joined("blocks"),
            tokens_NL=joined("tokens"),
        )


def predicted(output: Any, labels_B: Any) -> Any:
    """The classes that logits say, for each sample or each pixel, as the labels are."""
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
    collect: Callable[[Any, Iterable[Any]], ExitLogits] = logits_of_batches
    if not isinstance(runner, Session):
        from offramp.evaluation.networks import collect_from_runner as collect
        from offramp.evaluation.networks import is_network, make_runner

        if is_network(runner):
            if logits is None:
                raise InvalidArgumentError(
                    "Expected evaluate(network, policy, data), or evaluate(runner, data). Got a "
                    f"{type(runner).__name__} and nothing behind its policy or data."
                )
            asked = asked or _asked_of(loader)
            runner, loader, logits = make_runner(runner, loader), logits, None
    if logits is None:
        gathered = _Gathered()
        logits = collect(runner, gathered.answering(runner, loader))
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
    drop = answers.drop(logits)
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
