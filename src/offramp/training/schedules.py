"""The learning rate over the epochs, as a factor on its largest value."""

from __future__ import annotations

import math


def cosine_factor(epoch: int, num_epochs: int, *, warmup_epochs: int = 0) -> float:
    """A cosine to zero, after a linear rise if one is wanted.

    Args:
        epoch: Number of the epoch, from 0.
        num_epochs: Epochs in all.
        warmup_epochs: So many first ones rise in even steps, fewer than all.
    Returns:
        In [0, 1]; 0 from ``num_epochs`` on.
    Example:
        >>> [round(cosine_factor(epoch, 5, warmup_epochs=1), 2) for epoch in range(5)]
        [0.5, 1.0, 0.85, 0.5, 0.15]
    """
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    share = min((epoch - warmup_epochs) / (num_epochs - warmup_epochs), 1.0)
    return (1 + math.cos(math.pi * share)) / 2
