"""Checks that a network can be trained as configured, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offramp.errors import InvalidArgumentError
from offramp.families import FAMILIES, family_of
from offramp.training.config import FitConfig
from offramp.zoo import Network


def check_config(network: Network, config: FitConfig) -> None:
    """Make sure that a network can be trained as configured, before anything is written."""
    if not isinstance(config, FitConfig):
        raise InvalidArgumentError(
            f"Expected a FitConfig, such as FitConfig(epochs=5). Got {type(config).__name__}."
        )
    own = family_of(network)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise InvalidArgumentError(
            "Expected parameters to train. All of this network's are frozen: call "
            "requires_grad_(True) on those to train, such as network.exits."
        )
    weights = config.loss_weights
    if weights is not None and len(weights) != network.num_exits:
        raise InvalidArgumentError(
            f"The 'loss_weights' parameter must hold {network.num_exits} numbers, one per exit. "
            f"Got {len(weights)}."
        )
    for family in FAMILIES.values():
        if family.settings is None or family is own:
            continue
        if getattr(config, family.settings) is not None:
            raise InvalidArgumentError(
                f"The {family.settings!r} parameter is about {family.words.kind}. This one is "
                f"none: leave it out, or make one with {family.words.maker}."
            )
    if config.class_weights is not None and "class_weights" not in network.outputs.settings:
        raise InvalidArgumentError(
            "The 'class_weights' parameter is about networks that say a class for every pixel. "
            "This one says one for an image: leave it out, or balance with class_balance."
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            "The device cuda was asked for, but torch sees no CUDA device here. Use the device cpu."
        )


def check_class_weights(weights: Sequence[float] | None, *, num_classes: int) -> None:
    """Make sure that there is a weight for each class, or none."""
    if weights is not None and len(weights) != num_classes:
        raise InvalidArgumentError(
            f"The 'class_weights' parameter must hold {num_classes} numbers, one per class. "
            f"Got {len(weights)}."
        )
