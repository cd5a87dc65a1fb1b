"""Losses of a network with several exits, as pure functions.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from offramp.errors import InvalidArgumentError


def joint_loss(
    outputs: Sequence[Tensor],
    labels_B: Tensor,
    *,
    weights: Sequence[float],
    label_smoothing: float = 0.0,
    distillation: float = 0.0,
) -> Tensor:
    """Weighted sum of the exits' losses.

    The final exit's loss is cross entropy. The others mix cross entropy with the divergence
    from the final exit's predictions, which are not pulled towards them.

    Args:
        outputs: Raw logits of each exit, shape (B, C) each, the final exit last.
        labels_B: Classes, shape (B,), int64.
        weights: One weight per exit.
        label_smoothing: Share of the target spread over all classes, in [0, 1).
        distillation: Share of the exits' loss that comes from the final exit, in [0, 1].
    Returns:
        A scalar.
    Raises:
        InvalidArgumentError: If there is not one weight per exit.
    Reference: Teerapittayanon et al. (2016), equation 1; the distillation term is that of Zhang
        et al. (2019), Be Your Own Teacher, equation 3, at temperature 1.
    """
    if len(weights) != len(outputs):
        raise InvalidArgumentError(
            f"Expected one loss weight for each of the {len(outputs)} exits. Got {len(weights)}."
        )
    total = outputs[-1].new_zeros(())
    for k, (logits_BC, weight) in enumerate(zip(outputs, weights, strict=True)):
        loss = F.cross_entropy(logits_BC, labels_B, label_smoothing=label_smoothing)
        if distillation and k < len(outputs) - 1:
            divergence = distillation_loss(logits_BC, outputs[-1])
            loss = (1 - distillation) * loss + distillation * divergence
        total = total + weight * loss
    return total


def distillation_loss(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's classes from the teacher's, batch mean.

    Args:
        student_BC: Raw logits that learn, shape (B, C).
        teacher_BC: Raw logits to be matched, shape (B, C); no gradient reaches them.
    Returns:
        A scalar in nats.
    """
    return F.kl_div(
        student_BC.log_softmax(-1),
        teacher_BC.detach().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
