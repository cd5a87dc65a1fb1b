"""Exit heads: small classifiers that hang on a stage."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from offramp.errors import InvalidArgumentError, ShapeError


def linear_head(in_features: int, num_classes: int) -> nn.Module:
    """One linear layer on flat features.

    Args:
        in_features: Length of a sample's features.
        num_classes: Number of classes.
    Returns:
        A module from (B, in_features) to (B, num_classes).
    """
    return nn.Linear(in_features, num_classes)


def pooled_head(channels: int, num_classes: int) -> nn.Module:
    """Global average pooling over the pixels, then one linear layer.

    Args:
        channels: Channels of the feature map.
        num_classes: Number of classes.
    Returns:
        A module from (B, channels, H, W) to (B, num_classes).
    """
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def grid_head(channels: int, side: int, num_classes: int, *, window: int = 3) -> nn.Module:
    """Average pooling that keeps a coarse grid of positions, then one linear layer.

    Costs a little more than :func:`pooled_head` and keeps where things are, which a shallow
    exit needs: its features are local strokes, not yet whole shapes.

    Args:
        channels: Channels of the feature map.
        side: Height and width of the feature map, at least ``window``.
        num_classes: Number of classes.
        window: Side of the pooling window, in pixels; it moves by two.
    Returns:
        A module from (B, channels, side, side) to (B, num_classes).
    """
    cells = (side - window) // 2 + 1
    return nn.Sequential(
        nn.AvgPool2d(window, stride=2),
        nn.Flatten(),
        nn.Linear(channels * cells * cells, num_classes),
    )


def conv_head(channels: int, num_classes: int) -> nn.Module:
    """A separable convolution that halves the map and doubles its channels, mixed pooling, linear.

    For shallow exits: a linear layer on pooled features sees only which local patterns occur, and
    the convolution says which of them occur together. It costs about a tenth of the residual
    block that it hangs on.

    Args:
        channels: Channels of the feature map.
        num_classes: Number of classes.
    Returns:
        A module from (B, channels, H, W) to (B, num_classes).
    Reference: Kaya et al. (2019), Shallow-Deep Networks, section 4.1, for the mixed pooling; the
        convolution is ours.
    """
    width = 2 * channels
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        MixedPool2d(),
        nn.Linear(width, num_classes),
    )


class MixedPool2d(nn.Module):
    """Global pooling: a learned mix of the maximum and the average over the pixels.

    The share of the maximum is the sigmoid of a parameter that starts at 0: half of each.
    Maps (B, C, H, W) to (B, C).
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(()))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Pool a feature map."""
        share = self.mix.sigmoid()
        return share * x_BCHW.amax((2, 3)) + (1 - share) * x_BCHW.mean((2, 3))


def token_head(
    width: int,
    num_classes: int,
    *,
    pool: Literal["mean", "first", "last"] = "mean",
    hidden: int | None = None,
) -> nn.Module:
    """One token for all, then one linear layer, or two.

    Args:
        width: Length of a token.
        num_classes: Number of classes.
        pool: mean, over the tokens that are no padding; first, the class token; or last, the last
            token that is no padding, the one that has seen all others where each sees those before.
        hidden: Width of a layer with tanh before the last, as in BERT's pooler; None for none.
    Returns:
        A module from (B, T, width), and where there is one the mask (B, T) that is 0 on padding,
        to (B, num_classes).
    Raises:
        InvalidArgumentError: If ``pool`` is none of these.
    """
    if pool not in ("mean", "first", "last"):
        raise InvalidArgumentError(
            f"The 'pool' parameter must be mean, first or last. Got {pool!r}."
        )
    return TokenHead(width, num_classes, pool=pool, hidden=hidden)


class TokenHead(nn.Module):
    """See :func:`token_head`."""

    def __init__(self, width: int, num_classes: int, *, pool: str, hidden: int | None) -> None:
        super().__init__()
        self.classify: nn.Module = nn.Linear(width, num_classes)
        if hidden is not None:
            self.classify = nn.Sequential(
                nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, num_classes)
            )
        self.pool = pool

    def forward(self, tokens_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Map tokens to logits."""
        if self.pool == "first":
            pooled_BD = tokens_BTD[:, 0]
        elif self.pool == "last" and mask_BT is None:
            pooled_BD = tokens_BTD[:, -1]
        elif self.pool == "last":
            assert mask_BT is not None
            positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
            last_B11 = ((mask_BT != 0) * positions_T).argmax(1)[:, None, None]
            pooled_BD = tokens_BTD.gather(1, last_B11.expand(-1, 1, tokens_BTD.shape[2]))[:, 0]
        elif mask_BT is None:
            pooled_BD = tokens_BTD.mean(dim=1)
        else:
            weights_BT1 = mask_BT[:, :, None].to(tokens_BTD.dtype)
            pooled_BD = (tokens_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)
        logits_BC: Tensor = self.classify(pooled_BD)
        return logits_BC


class MeanHead(nn.Module):
    """The mean over all positions, then one linear layer.

    Args:
        channels: Channels of the features.
        num_classes: Number of classes.
        axis: The axis of channels.
    """

    def __init__(self, channels: int, num_classes: int, *, axis: int) -> None:
        super().__init__()
        self.classify = nn.Linear(channels, num_classes)
        self._axis = axis

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, ..., channels, ...) to (B, num_classes)."""
        positions = [axis for axis in range(1, features.ndim) if axis != self._axis]
        logits_BC: Tensor = self.classify(features.mean(positions))
        return logits_BC


def head_for(features: Tensor, num_classes: int, *, axis: int) -> nn.Module:
    """Choose the head that fits a stage's features.

    Args:
        features: What the stage returns, the batch axis first, at least two axes.
        num_classes: Number of classes.
        axis: The axis of channels, at least 1; all others but the batch's are positions.
    Returns:
        A linear head for (B, D), a token head for (B, T, D), a pooled head for (B, C, H, W), and a
        linear layer on the mean over all positions for features of other axes.
    Raises:
        ShapeError: If the features have no such axis.
    """
    if not 1 <= axis < features.ndim:
        raise ShapeError(
            f"The 'axis' parameter must be an int in [1, {features.ndim - 1}] for features of "
            f"shape {tuple(features.shape)}. Got {axis}."
        )
    channels = features.shape[axis]
    if features.ndim == 2:
        return linear_head(channels, num_classes)
    if features.ndim == 3 and axis == 2:
        return token_head(channels, num_classes)
    if features.ndim == 4 and axis == 1:
        return pooled_head(channels, num_classes)
    return MeanHead(channels, num_classes, axis=axis)
