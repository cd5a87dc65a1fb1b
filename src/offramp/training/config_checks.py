"""Whether a network can be trained as configured, asked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from offramp.errors import InvalidArgumentError
from offramp.model.multi_exit import MultiExitNetwork
from offramp.routing.halting import HaltingNetwork
from offramp.routing.skip import SkipNetwork
from offramp.training.config import FitConfig
from offramp.training.regimes import head_parameters
from offramp.zoo import Network


def check_config(network: Network, config: FitConfig) -> None:
    """Make sure that a network can be trained as configured, before anything is written.

    Args:
        network: The network.
        config: How to train it.
    Raises:
        InvalidArgumentError: If the network is none of Offramp's, or has nothing to train, or
            there is not one loss weight per exit, or the backbone shall be frozen and nothing else
            can be trained, or a setting is for another kind of network, or cuda was asked for and
            there is none.
    """
    if not isinstance(config, FitConfig):
        raise InvalidArgumentError(
            f"Expected a FitConfig, such as FitConfig(epochs=5). Got {type(config).__name__}."
        )
    if not isinstance(network, get_args(Network)):
        raise InvalidArgumentError(
            "Expected a network with exits, gates or halting tokens to train. Got "
            f"{type(network).__name__}: call add_exits(backbone, ...), add_gates or add_halting "
            "first."
        )
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
    _check_kind(network, config)
    if isinstance(network, MultiExitNetwork):
        _check_regimes(network, config)
    else:
        _check_regimes_unused(config)
    is_dense = isinstance(network, MultiExitNetwork) and network.is_dense
    if config.class_weights is not None and not is_dense:
        raise InvalidArgumentError(
            "The 'class_weights' parameter is about networks that say a class for every pixel. "
            "This one says one for an image: leave it out, or balance with class_balance."
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            "The device cuda was asked for, but torch sees no CUDA device here. Use the device cpu."
        )


def check_class_weights(weights: Sequence[float] | None, *, num_classes: int) -> None:
    """Make sure that there is a weight for each class, or none.

    Args:
        weights: Of the classes in the loss; None for none.
        num_classes: Number of classes.
    Raises:
        InvalidArgumentError: If there are more or fewer.
    """
    if weights is not None and len(weights) != num_classes:
        raise InvalidArgumentError(
            f"The 'class_weights' parameter must hold {num_classes} numbers, one per class. "
            f"Got {len(weights)}."
        )


def _check_kind(network: Network, config: FitConfig) -> None:
    for name, kind, what, maker in (
        ("gates", SkipNetwork, "networks that skip blocks", "add_gates"),
        ("halting", HaltingNetwork, "networks whose tokens halt", "add_halting"),
    ):
        if getattr(config, name) is not None and not isinstance(network, kind):
            raise InvalidArgumentError(
                f"The {name!r} parameter is about {what}. This one is none: leave it out, or make "
                f"one with {maker}."
            )


def _check_regimes_unused(config: FitConfig) -> None:
    """Where blocks or tokens are dropped there is one exit: what is about several is refused."""
    names = (
        *("loss_weights", "detach", "freeze_backbone", "gradient_equilibrium"),
        *("backbone_epochs", "ramp_epochs", "distillation"),
    )
    for name in names:
        if getattr(config, name):
            raise InvalidArgumentError(
                f"The {name!r} parameter is about several exits. This network has one, and saves "
                f"inside: leave it out. Got {getattr(config, name)!r}."
            )


def _check_regimes(network: MultiExitNetwork, config: FitConfig) -> None:
    if config.freeze_backbone and not any(p.requires_grad for p in head_parameters(network)):
        raise InvalidArgumentError(
            "'freeze_backbone' trains only the exits before the final one. This network has "
            f"{network.num_exits - 1} of them, without weights of their own to train: add exits, "
            "or train the backbone too."
        )
