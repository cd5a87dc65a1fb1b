"""A DeiT-tiny whose tokens halt after planned numbers of layers, while their scores are computed.

The first coordinate of a token, which its score is taken from, is the first value of its patch: the
filter of the patches reads it, no position and no layer adds to it. So the plan is written into
the images, and every engine runs the same network on them.

Shapes: ``N`` images, ``P`` patches of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.routing.halting import HaltingNetwork
from offramp.zoo.vit import PatchEmbed, PreNormLayer, vit

SAMPLES = 128
SIDE, PATCH, DEPTH = 224, 16, 12
THRESHOLD = 0.99
MEAN_DEPTH, SPREAD = 7.23, 2.5


@torch.no_grad()
def planned_network(*, seed: int) -> tuple[HaltingNetwork, Tensor, Tensor]:
    """Build an untrained network, images, and the plan of how far their patches go.

    Args:
        seed: Of weights, images and plan.
    Returns:
        network: In evaluation mode; its class token runs every layer.
        images: Shape (N, 3, 224, 224).
        depth_NP: Layers that each patch runs, shape (N, P), int64.
    """
    torch.manual_seed(seed)
    network = vit(
        in_channels=3,
        side=SIDE,
        patch=PATCH,
        width=192,
        depth=DEPTH,
        num_heads=3,
        num_classes=1000,
        gate_scale=1.0,
        gate_center=0.0,
    ).eval()
    assert isinstance(network, HaltingNetwork)
    _free_first_coordinate(network)
    depth_NP = draw_plan()
    images = torch.randn(SAMPLES, 3, SIDE, SIDE)
    side = SIDE // PATCH
    images[:, 0, ::PATCH, ::PATCH] = _score_input(depth_NP).reshape(SAMPLES, side, side)
    return network, images, depth_NP


def draw_plan() -> Tensor:
    """Draw independent depths, shape (N, P)."""
    drawn = MEAN_DEPTH + SPREAD * torch.randn(SAMPLES, (SIDE // PATCH) ** 2)
    return drawn.round().clamp(1, DEPTH).long()


def planned_tokens(depth_NP: Tensor) -> Tensor:
    """Tokens that run each layer, the class token counted, shape (N, L)."""
    return 1 + torch.stack([(depth_NP > layer).sum(1) for layer in range(DEPTH)], 1)


def _score_input(depth: Tensor) -> Tensor:
    """A coordinate whose score, the same after each layer, reaches the threshold at a depth."""
    score = (THRESHOLD / (depth - 0.5)).clamp(max=1 - 1e-6)
    return torch.logit(score)


def _free_first_coordinate(network: HaltingNetwork) -> None:
    embed = network.embed
    assert isinstance(embed, PatchEmbed)
    embed.project.weight[0] = 0
    embed.project.weight[0, 0, 0, 0] = 1
    assert embed.project.bias is not None
    embed.project.bias[0] = 0
    embed.positions[..., 0] = 0
    embed.class_token[..., 0] = _score_input(torch.tensor(DEPTH))
    for layer in network.layers:
        assert isinstance(layer, PreNormLayer)
        for linear in (layer.out, layer.mlp[2]):
            linear.weight[0] = 0
            linear.bias[0] = 0
