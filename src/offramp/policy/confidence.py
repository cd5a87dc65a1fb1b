"""Confidence of an exit's logits: one number in [0, 1] per sample, higher is surer.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from offramp.errors import InvalidArgumentError, ShapeError


def entropy_confidence(logits_BC: Tensor) -> Tensor:
    """One minus the entropy of the class distribution, over its largest possible value.

    Computed from log-softmax, so that near-certain samples keep their precision and no
    constant has to be added inside the logarithm.

    Args:
        logits_BC: Raw logits, shape (B, C), float, C at least 2.
    Returns:
        ``1 - H / log C`` per sample, shape (B,); NaN where the logits are NaN.
    Raises:
        ShapeError: If the last axis holds fewer than two classes.
    Reference: Teerapittayanon et al. (2016), BranchyNet, section III-C (there unnormalised,
        and lower is surer).
    Example:
        >>> import torch
        >>> entropy_confidence(torch.tensor([[0.0, 0.0], [50.0, 0.0]]))
        tensor([0., 1.])
    """
    log_p_BC = _log_softmax(logits_BC)
    # A class of probability 0 adds 0: exp(-200) is 0 in float32, and 0 * -200 is no NaN.
    negative_entropy_B = (log_p_BC.exp() * log_p_BC.clamp_min(-200)).sum(-1)
    return (1 + negative_entropy_B / math.log(logits_BC.shape[-1])).clamp(0, 1)


def max_probability_confidence(logits_BC: Tensor) -> Tensor:
    """The largest class probability.

    Args:
        logits_BC: Raw logits, shape (B, C), float, C at least 2.
    Returns:
        Probability of the predicted class per sample, shape (B,), in [1/C, 1].
    Raises:
        ShapeError: If the last axis holds fewer than two classes.
    """
    return _log_softmax(logits_BC).amax(-1).exp()


def margin_confidence(logits_BC: Tensor) -> Tensor:
    """The largest class probability minus the second largest.

    Args:
        logits_BC: Raw logits, shape (B, C), float, C at least 2.
    Returns:
        Difference per sample, shape (B,), in [0, 1].
    Raises:
        ShapeError: If the last axis holds fewer than two classes.
    """
    top_B2 = _log_softmax(logits_BC).exp().topk(2, dim=-1).values
    return top_B2[..., 0] - top_B2[..., 1]


CONFIDENCE_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": entropy_confidence,
    "max_probability": max_probability_confidence,
    "margin": margin_confidence,
}
"""The confidence functions by the name that policies, files and the command line use."""


def confidence_from_entropy_nats(entropy_nats: float, num_classes: int) -> float:
    """Turn "leave if the entropy is at most this" into a confidence threshold.

    Args:
        entropy_nats: Entropy threshold in nats, in [0, log C].
        num_classes: Number of classes C, at least 2.
    Returns:
        The threshold on :func:`entropy_confidence` that decides alike.
    Raises:
        InvalidArgumentError: If the entropy is outside [0, log C], or C is below 2.
    Example:
        >>> round(confidence_from_entropy_nats(0.1, 47), 4)
        0.974
    """
    if num_classes < 2:
        raise InvalidArgumentError(
            f"The 'num_classes' parameter must be an int of at least 2. Got {num_classes}."
        )
    largest = math.log(num_classes)
    if not 0 <= entropy_nats <= largest:
        raise InvalidArgumentError(
            f"An entropy threshold must be in [0, {largest:.3f}] nats for {num_classes} classes. "
            f"Got {entropy_nats}."
        )
    return 1 - entropy_nats / largest


def _log_softmax(logits_BC: Tensor) -> Tensor:
    if logits_BC.ndim < 1 or logits_BC.shape[-1] < 2:
        raise ShapeError(
            "Expected logits of shape (B, C) with at least 2 classes. "
            f"Got shape {tuple(logits_BC.shape)}."
        )
    return logits_BC.float().log_softmax(-1)
