"""Losses of a network with several exits, as pure functions.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from offramp.errors import InvalidArgumentError


def joint_loss(
    outputs: Sequence[Tensor],
    labels_B: Tensor,
    *,
    weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    distillation: float = 0.0,
    class_weights_C: Tensor | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Add up the exits' losses, each times its weight.

    The final exit's loss is cross entropy. The others mix cross entropy with the divergence
    from the final exit's predictions, which are not pulled towards them.

    Args:
        outputs: Raw logits of each exit, shape (B, C) each, the final exit last.
        labels_B: Classes, shape (B,), int64.
        weights: One weight per exit; all 1 if None.
        label_smoothing: Share of the target spread over all classes, in [0, 1).
        distillation: Share of the exits' loss that comes from the final exit, in [0, 1].
        class_weights_C: How much a sample of each class counts in the cross entropy, shape (C,);
            all alike if None.
        loss: A function of an exit's logits and the labels that returns a scalar, instead of cross
            entropy; label smoothing and class weights are then its own business.
    Returns:
        A scalar.
    Raises:
        InvalidArgumentError: If there is not one weight per exit.
    Reference: Teerapittayanon et al. (2016), equation 1; the distillation term is that of Zhang
        et al. (2019), Be Your Own Teacher, equation 3, at temperature 1.
    Example:
        >>> from torch import tensor
        >>> outputs = [tensor([[2.0, 0.0]]), tensor([[0.0, 2.0]])]
        >>> round(joint_loss(outputs, tensor([1]), weights=(0.5, 1.0)).item(), 4)
        1.1904
    """
    if weights is None:
        weights = (1.0,) * len(outputs)
    if len(weights) != len(outputs):
        raise InvalidArgumentError(
            f"Expected one loss weight for each of the {len(outputs)} exits. Got {len(weights)}."
        )
    total = outputs[-1].new_zeros(())
    for k, (logits_BC, weight) in enumerate(zip(outputs, weights, strict=True)):
        if loss is None:
            of_exit = F.cross_entropy(
                logits_BC, labels_B, weight=class_weights_C, label_smoothing=label_smoothing
            )
        else:
            of_exit = loss(logits_BC, labels_B)
        if distillation and k < len(outputs) - 1:
            divergence = distillation_loss(logits_BC, outputs[-1])
            of_exit = (1 - distillation) * of_exit + distillation * divergence
        total = total + weight * of_exit
    return total


def weights_in_epoch(
    weights: Sequence[float], *, epoch: int, backbone_epochs: int = 0, ramp_epochs: int = 0
) -> tuple[float, ...]:
    """Loss weights of an epoch; the final exit's is always full, the others' may come later.

    They are 0 for the first epochs, then grow linearly from 0 to full. An epoch has one weight:
    that of its middle.

    Example:
        >>> for epoch in range(4):
        ...     weights_in_epoch((0.5, 1.0), epoch=epoch, backbone_epochs=1, ramp_epochs=2)
        (0.0, 1.0)
        (0.125, 1.0)
        (0.375, 1.0)
        (0.5, 1.0)
    """
    after = epoch - backbone_epochs
    if after < 0:
        share = 0.0
    elif after < ramp_epochs:
        share = (after + 0.5) / ramp_epochs
    else:
        share = 1.0
    return (*(share * weight for weight in weights[:-1]), weights[-1])


def distillation_loss(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's classes from the teacher's, batch mean."""
    return F.kl_div(
        student_BC.log_softmax(-1),
        teacher_BC.detach().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
