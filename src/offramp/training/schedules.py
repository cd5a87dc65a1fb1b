"""The learning rate over the epochs, as a factor on its largest value."""

from __future__ import annotations

import math


def cosine_factor(epoch: int, num_epochs: int, *, warmup_epochs: int = 0) -> float:
    """A cosine to zero, after a linear rise if one is wanted.

    Example:
        >>> [round(cosine_factor(epoch, 5, warmup_epochs=1), 2) for epoch in range(5)]
        [0.5, 1.0, 0.85, 0.5, 0.15]
    """
    if epoch < warmup_epochs:
        return (epoch + 1) / (warmup_epochs + 1)
    share = min((epoch - warmup_epochs) / (num_epochs - warmup_epochs), 1.0)
    return (1 + math.cos(math.pi * share)) / 2


def two_cosines(
    epoch: int,
    num_first: int,
    num_second: int,
    *,
    second_factor: float,
    warmup_epochs: int = 0,
) -> float:
    """A cosine to zero over each of two phases, the first after a rise if one is wanted.

    Example:
        >>> [round(two_cosines(e, 2, 2, second_factor=0.2), 2) for e in range(5)]
        [1.0, 0.5, 0.2, 0.1, 0.0]
    """
    if epoch < num_first:
        return cosine_factor(epoch, num_first, warmup_epochs=warmup_epochs)
    return second_factor * cosine_factor(epoch - num_first, num_second) if num_second else 0.0
