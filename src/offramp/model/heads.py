"""Exit heads: small classifiers that hang on a stage."""

from __future__ import annotations

from torch import Tensor, nn

from offramp.errors import ShapeError


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


def token_head(width: int, num_classes: int) -> nn.Module:
    """Mean over the tokens, then one linear layer.

    Args:
        width: Length of a token.
        num_classes: Number of classes.
    Returns:
        A module from (B, T, width) to (B, num_classes).
    """
    return nn.Sequential(_MeanToken(), nn.Linear(width, num_classes))


def head_for(features: Tensor, num_classes: int) -> nn.Module:
    """Choose the head that fits a stage's features.

    Args:
        features: What the stage returns: (B, D), (B, T, D) or (B, C, H, W).
        num_classes: Number of classes.
    Returns:
        A linear, token or pooled head.
    Raises:
        ShapeError: If the features have another number of axes.
    """
    if features.ndim == 2:
        return linear_head(features.shape[1], num_classes)
    if features.ndim == 3:
        return token_head(features.shape[2], num_classes)
    if features.ndim == 4:
        return pooled_head(features.shape[1], num_classes)
    raise ShapeError(
        "An exit head can be chosen for features of shape (B, D), (B, T, D) or (B, C, H, W). "
        f"Got {tuple(features.shape)}: pass your own with 'heads'."
    )


class _MeanToken(nn.Module):
    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return tokens_BTD.mean(dim=1)
