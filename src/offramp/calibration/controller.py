"""Fitting the scorers of a learned controller on held-out logits.

From the last early exit backwards: what going on is worth depends on what the scorers after an exit
decide, so these come first.

Shapes: ``K`` exits, ``N`` samples, ``R`` rows to learn from, ``F`` inputs, ``H`` hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from offramp.calibration.logits import ExitLogits
from offramp.errors import InvalidArgumentError
from offramp.policy.controller import ControllerPolicy, ExitScorer, scorer_inputs
from offramp.policy.policies import State

_HIDDEN = 16
"""Hidden units of a scorer."""

_STEPS, _BATCH, _LEARNING_RATE, _WEIGHT_DECAY = 300, 256, 1e-2, 1.0
"""Settings of AdamW, which fits a scorer; the learning rate falls to 0 along a cosine."""

_LEAST_SCALE = 1e-2
"""Inputs that vary less than this are not blown up."""


@torch.enable_grad()
def fit_controller(logits: ExitLogits, *, price: float = 0.1, seed: int = 0) -> ControllerPolicy:
    """Learn at each exit what leaving there is worth, compared with going on.

    At a price for compute, the advantage of leaving is how likely the exit is right
    (``logits.expected_scores_KN``) less how likely the exit is that
    the sample would leave by under the later scorers, plus the price of the MACs that are saved.
    Each exit's scorer predicts it by least squares.

    A budget is met by thresholds on the scores: hand this function, or what it returns, to
    :func:`~offramp.calibrate` as its rule. They rank samples much the same at any price, so that
    one price does for all budgets. Half of the rows that a scorer learns from have exits before it
    left out at random, so that exits can be switched off afterwards.

    Args:
        logits: Every exit's logits on held-out data; 1,000 samples at least say something.
        price: Probability of being right that the MACs of the whole plain network are worth,
            positive: the higher, the earlier samples leave at the policy's own thresholds.
        seed: Draws first weights and batches.
    Returns:
        A policy with all thresholds at 0.5: a sample leaves as soon as it pays at this price.
    Raises:
        InvalidArgumentError: If the price is not positive and finite.
    Reference: Regol et al. (2024), JEI-DNN, section 4, for the price, and Ilhan et al. (2024),
        EENet, section 3, for what scorers see; see :class:`ControllerPolicy` for what differs.
    """
    if not 0 < price < math.inf:
        raise InvalidArgumentError(
            f"The 'price' parameter must be a positive number, e.g. 0.1. Got {price}."
        )
    generator = torch.Generator().manual_seed(seed)
    costs = logits.costs
    macs_K = torch.tensor(costs.exit_macs(), dtype=torch.float64) / costs.plain_macs
    value_KN = torch.tensor(logits.expected_scores_KN) - price * macs_K[:, None]
    weights_N = torch.tensor(logits.weights_N, dtype=torch.float32)
    logits_KNC = torch.as_tensor(logits.logits_KNC)
    inputs_of_exits = list(_inputs(logits_KNC, generator))
    going_on_N = value_KN[-1]
    scorers: list[ExitScorer] = []
    with _one_thread():
        for k in reversed(range(costs.num_exits - 1)):
            inputs_RF = inputs_of_exits[k]
            advantage_N = (value_KN[k] - going_on_N).float()
            # What says NaN may not leave, and teaches nothing.
            can_leave_N = ~logits_KNC[k].isnan().any(-1)
            scorer = _fit(inputs_RF, advantage_N, weights_N * can_leave_N, generator)
            leave_N = can_leave_N & (scorer.score(inputs_RF[: len(weights_N)]) >= 0)
            going_on_N = torch.where(leave_N, value_KN[k], going_on_N)
            scorers.insert(0, scorer)
    return ControllerPolicy((0.5,) * len(scorers), tuple(scorers))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps are too small to share: threads would wait for one another, and round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _inputs(logits_KNC: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the inputs of each early exit's scorer, shape (R, F) with R = 2 N.

    First come all samples with every exit known, then all once more with each exit unknown to
    those after it in one half of the samples.
    """
    num_early, num_samples = len(logits_KNC) - 1, logits_KNC.shape[1]
    whole: State = ()
    parted: State = ()
    for k in range(num_early):
        logits_NC = logits_KNC[k].float()
        whole_NF, whole = scorer_inputs(k, logits_NC, whole, num_early=num_early)
        parted_NF, after = scorer_inputs(k, logits_NC, parted, num_early=num_early)
        before = parted or tuple(torch.full_like(tensor, math.nan) for tensor in after)
        is_on_N1 = torch.rand(num_samples, 1, generator=generator) < 0.5
        parted = tuple(torch.where(is_on_N1, a, b) for a, b in zip(after, before, strict=True))
        yield torch.cat([whole_NF, parted_NF])


def _fit(
    inputs_RF: Tensor, target_N: Tensor, weights_N: Tensor, generator: torch.Generator
) -> ExitScorer:
    """Least squares, each sample as its weight says; rows are samples once or several times."""
    num_inputs = inputs_RF.shape[1]
    mean_F = inputs_RF.nanmean(0).nan_to_num()
    scale_F = (inputs_RF - mean_F).square().nanmean(0).nan_to_num().sqrt().clamp_min(_LEAST_SCALE)
    first = torch.randn(num_inputs, _HIDDEN, generator=generator) / math.sqrt(num_inputs)
    mean_target = (weights_N * target_N).sum() / weights_N.sum().clamp_min(1e-12)
    learned = {
        "hidden_FH": first,
        "hidden_bias_H": torch.zeros(_HIDDEN),
        "direct_F": torch.zeros(num_inputs),
        "score_H": torch.zeros(_HIDDEN),
        "score_bias": mean_target,
    }
    for tensor in learned.values():
        tensor.requires_grad_()
    optimizer = torch.optim.AdamW(
        learned.values(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, foreach=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    scorer = ExitScorer(mean_F=mean_F, scale_F=scale_F, **learned)
    for _ in range(_STEPS):
        rows = torch.randint(len(inputs_RF), (_BATCH,), generator=generator)
        samples = rows % len(target_N)
        error_B = scorer.score(inputs_RF[rows]) - target_N[samples]
        optimizer.zero_grad()
        (weights_N[samples] * error_B.square()).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return ExitScorer(**{name: tensor.detach() for name, tensor in scorer.tensors.items()})
