"""The tutorial's network: linear stages with ReLU, an exit after each."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from offramp.errors import InvalidArgumentError
from offramp.model.heads import linear_head
from offramp.model.multi_exit import MultiExitNetwork


def mlp(
    *, in_features: int, widths: tuple[int, ...], num_classes: int, num_exits: int | None = None
) -> MultiExitNetwork:
    """Build Linear-ReLU stages with a linear exit after each."""
    num_layers = len(widths)
    num_exits = num_layers if num_exits is None else num_exits
    if not 1 <= num_exits <= num_layers:
        raise InvalidArgumentError(
            f"The 'num_exits' parameter must be an int in [1, {num_layers}], the number of "
            f"layers. Got {num_exits}."
        )
    layers = [
        nn.Sequential(nn.Linear(width_in, width_out), nn.ReLU())
        for width_in, width_out in pairwise((in_features, *widths))
    ]
    first_end = num_layers - num_exits + 1
    stages = [nn.Sequential(nn.Flatten(), *layers[:first_end]), *layers[first_end:]]
    exits = [linear_head(width, num_classes) for width in widths[first_end - 1 :]]
    return MultiExitNetwork(stages, exits)
