"""Confidence of an exit's logits: one number in [0, 1] per sample, higher is surer.

Shapes: ``B`` batch, ``C`` classes, ``H W`` cells of dense logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from offramp.errors import InvalidArgumentError, ShapeError

if TYPE_CHECKING:  # rules are named without torch
    from torch import Tensor


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
    return _negentropy(_log_softmax(logits_BC))


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


def pixel_share_confidence(logits_BCHW: Tensor, pixel_threshold: float | Tensor) -> Tensor:
    """The share of pixels whose largest class probability reaches a threshold.

    All pixels count: at run time nobody knows which of them have no label.

    Reference: Kouris et al. (2022), Multi-Exit Semantic Segmentation Networks, section 5.2.
    Example:
        >>> import torch
        >>> logits = torch.tensor([[[[5.0, 0.0]], [[0.0, 0.0]]]])  # one pixel sure, one not
        >>> pixel_share_confidence(logits, 0.9)
        tensor([0.5000])
    """
    top_BHW = top_probability(logits_BCHW)
    is_sure_BHW = (top_BHW >= pixel_threshold).to(top_BHW.dtype)
    return top_BHW.where(top_BHW.isnan(), is_sure_BHW).mean((1, 2))


def mean_max_probability_confidence(logits_BCHW: Tensor) -> Tensor:
    """The largest class probability of a pixel, the mean over all pixels."""
    return top_probability(logits_BCHW).mean((1, 2))


def mean_entropy_confidence(logits_BCHW: Tensor) -> Tensor:
    """:func:`entropy_confidence` of a pixel, the mean over all pixels."""
    _check_dense(logits_BCHW)
    return _negentropy(logits_BCHW.movedim(1, -1).float().log_softmax(-1)).mean((1, 2))


def low_quantile_confidence(logits_BCHW: Tensor) -> Tensor:
    """The largest class probability that one pixel in twenty does not reach."""
    top_BP = top_probability(logits_BCHW).flatten(1)
    lowest_BP = top_BP.topk(top_BP.shape[1] // 20 + 1, dim=1, largest=False).values
    return lowest_BP.amax(1) + 0 * top_BP.sum(1)  # a sum is NaN where a pixel is


def agreement_confidence(labels_BHW: Tensor, before_BHW: Tensor) -> Tensor:
    """The share of pixels whose class the exit before predicted too."""
    return (labels_BHW == before_BHW).float().mean((1, 2))


def top_probability(logits_BCHW: Tensor) -> Tensor:
    """The largest class probability of every pixel."""
    _check_dense(logits_BCHW)
    logits = logits_BCHW.float()
    # As softmax, of which only the largest is needed; engines are slow at softmax over axis 1.
    return (logits - logits.amax(1, keepdim=True)).exp().sum(1).reciprocal()


CONFIDENCE_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": entropy_confidence,
    "max_probability": max_probability_confidence,
    "margin": margin_confidence,
}
"""The confidence functions by the name that policies, files and the command line use."""

PIXEL_SHARE = "pixel_share"
"""The dense confidence that has a threshold for pixels beside that for images."""

AGREEMENT = "agreement"
"""The dense confidence that remembers what the exit before predicted."""

DENSE_RULES: dict[str, Callable[[Tensor, float | Tensor], Tensor]] = {
    PIXEL_SHARE: pixel_share_confidence,
    "mean_max_probability": lambda logits, _: mean_max_probability_confidence(logits),
    "mean_entropy": lambda logits, _: mean_entropy_confidence(logits),
    "low_quantile": lambda logits, _: low_quantile_confidence(logits),
}
"""The same for dense logits, where no memory is needed; the second argument is for pixels."""


def confidence_from_entropy_nats(entropy_nats: float, num_classes: int) -> float:
    """Turn "leave if the entropy is at most this" into a confidence threshold.

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


def _negentropy(log_p: Tensor) -> Tensor:
    """One minus the entropy over the last axis as a share of the largest that there is."""
    # A class of probability 0 adds 0: exp(-200) is 0 in float32, and 0 * -200 is no NaN.
    negative_entropy = (log_p.exp() * log_p.clamp_min(-200)).sum(-1)
    return (1 + negative_entropy / math.log(log_p.shape[-1])).clamp(0, 1)


def _log_softmax(logits_BC: Tensor) -> Tensor:
    if logits_BC.ndim != 2 or logits_BC.shape[-1] < 2:
        raise ShapeError(
            "Expected logits of shape (B, C) with at least 2 classes; of one for every pixel "
            f"DensePolicy is sure. Got shape {tuple(logits_BC.shape)}."
        )
    return logits_BC.float().log_softmax(-1)


def _check_dense(logits_BCHW: Tensor) -> None:
    if logits_BCHW.ndim != 4 or logits_BCHW.shape[1] < 2:
        raise ShapeError(
            "Expected dense logits of shape (B, C, H, W) with at least 2 classes. "
            f"Got shape {tuple(logits_BCHW.shape)}."
        )
