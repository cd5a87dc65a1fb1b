"""Whether a network can be trained as configured, asked before anything is written."""

from __future__ import annotations

import torch

from offramp.errors import InvalidArgumentError
from offramp.model.multi_exit import MultiExitNetwork
from offramp.routing.skip import SkipNetwork
from offramp.training.config import FitConfig
from offramp.training.regimes import head_parameters


def check_config(network: MultiExitNetwork | SkipNetwork, config: FitConfig) -> None:
    """Make sure that a network can be trained as configured, before anything is written.

    Args:
        network: The network.
        config: How to train it.
    Raises:
        InvalidArgumentError: If there is not one loss weight per exit, or the backbone shall be
            frozen and nothing else can be trained, or a setting is for another kind of network,
            or cuda was asked for and there is none.
    """
    weights = config.loss_weights
    if weights is not None and len(weights) != network.num_exits:
        raise InvalidArgumentError(
            f"The 'loss_weights' parameter must hold {network.num_exits} numbers, one per exit. "
            f"Got {len(weights)}."
        )
    if isinstance(network, SkipNetwork):
        _check_regimes_unused(config)
    else:
        _check_regimes(network, config)
    is_dense = isinstance(network, MultiExitNetwork) and network.is_dense
    if config.class_weights is not None and not is_dense:
        raise InvalidArgumentError(
            "The 'class_weights' parameter is about networks that say a class for every pixel. "
            "This one says one for an image: leave it out, or balance with class_balance."
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            "The device cuda was asked for, but torch sees no CUDA device here. Use --device cpu."
        )


def _check_regimes_unused(config: FitConfig) -> None:
    """A network that skips blocks has one exit: what is about several says nothing to it."""
    for name in ("detach", "freeze_backbone", "gradient_equilibrium", "distillation"):
        if getattr(config, name):
            raise InvalidArgumentError(
                f"The {name!r} parameter is about several exits. This network has one, and skips "
                f"blocks: leave it out. Got {getattr(config, name)!r}."
            )


def _check_regimes(network: MultiExitNetwork, config: FitConfig) -> None:
    if config.gates is not None:
        raise InvalidArgumentError(
            "The 'gates' parameter is about networks that skip blocks. This one has exits: leave "
            "it out, or make one with add_gates."
        )
    if config.freeze_backbone and not any(p.requires_grad for p in head_parameters(network)):
        raise InvalidArgumentError(
            "'freeze_backbone' trains only the exits before the final one. This network has "
            f"{network.num_exits - 1} of them, without weights of their own to train: add exits, "
            "or train the backbone too."
        )
