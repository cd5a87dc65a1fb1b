"""Accuracy and cost of a runner on labelled data.

Shapes: ``B`` batch, ``C`` classes, ``K`` exits, ``N`` samples, ``G`` gates, ``L`` layers.
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
from offramp.model.multi_exit import as_inputs


@dataclass(frozen=True, kw_only=True)
class ExitEvaluation:
    """One exit.

    Attributes:
        index: Its number in the network, from 0.
        accuracy: Over all samples at that exit, a fraction.
        share: Of the samples that left there, a fraction.
        macs: Of the samples that left there, the mean; where none did, that of running every head.
    """

    index: int
    accuracy: float
    share: float
    macs: int


@dataclass(frozen=True, kw_only=True)
class BlocksEvaluation:
    """The blocks of a network that skips them.

    Attributes:
        run_rates: Share of the samples that ran each gated block, in order.
        saved: Share of the gated blocks that a sample skips, the mean.
        macs_saved: Share of the plain network's MACs that a sample saves, the mean, gates counted;
            below 0 where the gates cost more than is skipped.
    """

    run_rates: tuple[float, ...]
    saved: float
    macs_saved: float


@dataclass(frozen=True, kw_only=True)
class TokensEvaluation:
    """The tokens of a network in which they halt.

    Attributes:
        per_layer: Tokens of a sample that run each layer, the mean, in order.
        mean_depth: Layers that a token runs, the mean over all tokens.
        macs_saved: Share of the plain network's MACs that a sample saves, the mean; attention's
            part counted by the pairs of tokens that run.
    """

    per_layer: tuple[float, ...]
    mean_depth: float
    macs_saved: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a runner reached on a data set.

    Attributes:
        num_samples: How many samples were answered.
        accuracy: Of the adaptive network, a fraction.
        mean_macs: Mean MACs per sample that ran, heads and gates counted.
        plain_macs: MACs per sample of the plain network.
        final_exit_accuracy: Of the final exit on every sample, every block run; where tokens halt,
            with a threshold of 1, at which they stay longest.
        plain_accuracy: Of a plain network trained as long; None where none was given.
        exits: Figures of each exit; exits that are off in a bundle have none.
        blocks: Figures of the gated blocks; None where blocks are not skipped.
        tokens: Figures of the tokens; None where they do not halt.
    """

    num_samples: int
    accuracy: float
    mean_macs: float
    plain_macs: int
    final_exit_accuracy: float
    plain_accuracy: float | None
    exits: tuple[ExitEvaluation, ...]
    blocks: BlocksEvaluation | None = None
    tokens: TokensEvaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON, under the keys of ``offramp evaluate --json``."""
        content = asdict(self)
        content["exits"] = list(content["exits"])
        for name, rates in (("blocks", "run_rates"), ("tokens", "per_layer")):
            if content[name] is None:
                del content[name]
            else:
                content[name][rates] = list(content[name][rates])
        return content


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a runner said of every sample of a loader.

    Attributes:
        predictions_N: Predicted classes, shape (N,), int64.
        exit_index_N: Exits the samples left by, shape (N,), int64.
        macs_N: MACs that ran for each, shape (N,), int64.
        labels_N: True classes, shape (N,), int64.
        blocks_NG: Gated blocks that ran, shape (N, G), bool; None where blocks are not skipped.
        tokens_NL: Tokens that ran each layer, shape (N, L), int64; None where they do not halt.
    """

    predictions_N: Tensor
    exit_index_N: Tensor
    macs_N: Tensor
    labels_N: Tensor
    blocks_NG: Tensor | None = None
    tokens_NL: Tensor | None = None

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float((self.predictions_N == self.labels_N).double().mean())

    @property
    def mean_macs(self) -> float:
        """Mean MACs per sample."""
        return float(self.macs_N.double().mean())

    def shares(self, num_exits: int) -> tuple[float, ...]:
        """Share of the samples that left by each exit.

        Args:
            num_exits: Exits of the network.
        Returns:
            One fraction per exit.
        """
        counts_K = torch.bincount(self.exit_index_N, minlength=num_exits).double()
        return tuple((counts_K / len(self.labels_N)).tolist())


def answer(runner: Runner, loader: Iterable[tuple[Any, Tensor]]) -> Answers:
    """Run every sample of a loader.

    Args:
        runner: Any runner, of torch or of a bundle.
        loader: Batches of (inputs, labels) on the runner's device; inputs is a tuple where the
            network takes several.
    Returns:
        What it said, on the CPU.
    Raises:
        DataError: If the loader yields no sample.
    """
    predictions, exits, macs, labels, blocks, tokens = [], [], [], [], [], []
    for batch, labels_B in loader:
        result = runner.run(*as_inputs(batch))
        predictions.append(torch.as_tensor(result.output).argmax(-1).cpu())
        exits.append(torch.as_tensor(result.exit_index).cpu())
        macs.append(torch.as_tensor(result.macs).cpu())
        labels.append(labels_B.cpu())
        if result.blocks is not None:
            blocks.append(torch.as_tensor(result.blocks).cpu())
        if result.tokens is not None:
            tokens.append(torch.as_tensor(result.tokens).cpu())
    if not labels:
        raise DataError("Expected at least one batch of samples to evaluate. Got none.")
    return Answers(
        predictions_N=torch.cat(predictions),
        exit_index_N=torch.cat(exits),
        macs_N=torch.cat(macs),
        labels_N=torch.cat(labels),
        blocks_NG=torch.cat(blocks) if blocks else None,
        tokens_NL=torch.cat(tokens) if tokens else None,
    )


def evaluate(
    runner: Runner,
    loader: Iterable[tuple[Any, Tensor]],
    logits: ExitLogits,
    *,
    plain_accuracy: float | None = None,
) -> Evaluation:
    """Run every sample with a runner and compare with what each exit alone would have said.

    Args:
        runner: Any runner.
        loader: Batches of (inputs, labels) on the runner's device; inputs is a tuple where the
            network takes several.
        logits: Every exit's logits on the same samples in the same order, from ``collect``, or
            ``collect_from_session`` for a bundle.
        plain_accuracy: Of a plain network trained as long, to stand beside the figures.
    Returns:
        The figures.
    Raises:
        DataError: If the loader yields no sample.
        ShapeError: If the loader and the logits hold different samples.
    """
    answers = answer(runner, loader)
    if not torch.equal(answers.labels_N, logits.labels_N):
        raise ShapeError(
            "Expected the loader to yield the samples of the logits in the same order. "
            f"Got {len(answers.labels_N)} samples against {len(logits.labels_N)}, or other labels."
        )
    macs = dict(zip(logits.numbers, logits.costs.exit_macs(), strict=True))
    for k in torch.unique(answers.exit_index_N).tolist():
        macs[k] = round(float(answers.macs_N[answers.exit_index_N == k].double().mean()))
    shares = answers.shares(logits.numbers[-1] + 1)
    accuracy_K = logits.correct_KN.double().mean(1).tolist()
    return Evaluation(
        num_samples=len(answers.labels_N),
        accuracy=answers.accuracy,
        mean_macs=answers.mean_macs,
        plain_macs=logits.costs.plain_macs,
        final_exit_accuracy=accuracy_K[-1],
        plain_accuracy=plain_accuracy,
        exits=tuple(
            ExitEvaluation(index=k, accuracy=accuracy, share=shares[k], macs=macs[k])
            for k, accuracy in zip(logits.numbers, accuracy_K, strict=True)
        ),
        blocks=_describe_blocks(answers, plain_macs=logits.costs.plain_macs),
        tokens=_describe_tokens(answers, plain_macs=logits.costs.plain_macs),
    )


def _describe_blocks(answers: Answers, *, plain_macs: int) -> BlocksEvaluation | None:
    if answers.blocks_NG is None:
        return None
    run_rates_G = answers.blocks_NG.double().mean(0)
    return BlocksEvaluation(
        run_rates=tuple(run_rates_G.tolist()),
        saved=1 - float(run_rates_G.mean()),
        macs_saved=1 - answers.mean_macs / plain_macs,
    )


def _describe_tokens(answers: Answers, *, plain_macs: int) -> TokensEvaluation | None:
    if answers.tokens_NL is None:
        return None
    tokens_NL = answers.tokens_NL.double()
    return TokensEvaluation(
        per_layer=tuple(tokens_NL.mean(0).tolist()),
        mean_depth=float(tokens_NL.sum() / tokens_NL[:, 0].sum()),  # all run the first layer
        macs_saved=1 - answers.mean_macs / plain_macs,
    )
