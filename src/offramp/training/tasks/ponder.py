"""Losses that make tokens halt: how long they ponder, and where on average they shall halt.

Shapes: ``B`` batch, ``T`` tokens, ``L`` layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.routing.halting import HaltingOutput


def ponder_loss(output: HaltingOutput) -> Tensor:
    """Ponder loss: layers run and remainder, the mean over all tokens that are no padding.

    The number of layers has no gradient; a smaller remainder means larger scores before it.

    Reference: Graves (2016), Adaptive computation time, for layers plus remainder; Yin et al.
        (2022), A-ViT, for the mean over tokens.
    """
    return output.ponder.sum() / output.valid.sum()


def prior_loss(output: HaltingOutput, target_depth: float) -> Tensor:
    """Distance of the mean halting distribution from a normal one around a depth.

    The distribution is that of the tokens' weights over all layers, the mean over all tokens that
    are no padding: each token's weights sum to one, so it does too.

    Reference: Yin et al. (2022), A-ViT, the distributional prior; in the direction of its code.
    """
    mean_L = output.weight.sum((0, 1)) / output.valid.sum()
    prior_L = depth_prior(len(mean_L), target_depth, like=mean_L)
    log_mean_L = mean_L.clamp(min=torch.finfo(mean_L.dtype).tiny).log()
    return (torch.xlogy(prior_L, prior_L) - prior_L * log_mean_L).sum()  # far layers have none


def depth_prior(num_layers: int, target_depth: float, *, like: Tensor) -> Tensor:
    """A normal distribution of variance 1 over layers.

    Example:
        >>> depth_prior(3, 2, like=torch.zeros(()))
        tensor([0.2741, 0.4519, 0.2741])
    """
    layer_L = torch.arange(1, num_layers + 1, device=like.device, dtype=like.dtype)
    return (-0.5 * (layer_L - target_depth).square()).softmax(0)
