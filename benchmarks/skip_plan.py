"""SkipNet's ResNet-38 with actions that a seed has fixed, while its gates are really computed.

Shapes: ``N`` samples, ``B`` batch, ``C`` channels, ``G`` gates.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from offramp.routing.gates import Gates, GateState
from offramp.routing.skip import SkipNetwork
from offramp.zoo.skipnet import skipnet

SAMPLES = 512
SHARES = {0.7: 0.25, 0.5: 0.75}
"""Share of the gated blocks that run, and the threshold of the gates that it takes."""
_LEVELS = (5.0, 0.0, -5.0)
"""Scores of blocks that run at both thresholds (0.993), at the lower one (0.5), at none (0.007)."""
_SCORE_SCALE = 0.01
"""What a gate computes is scaled by this, and too little to take a block over a threshold."""


class PlannedGates(Gates):
    """Real gates whose scores are added to what a plan says of the sample and the gate.

    The first gate finds the sample in the plan by its pooled features, and hands on what it found.

    Args:
        gates: The gates.
        levels_NG: What the plan adds to each score, shape (N, G).
        keys_NC: Pooled features of each sample in front of the first gate, shape (N, C).
    """

    def __init__(self, gates: Gates, levels_NG: Tensor, keys_NC: Tensor) -> None:
        super().__init__()
        self.gates = gates
        self.register_buffer("levels_NG", levels_NG)
        self.register_buffer("keys_CN", keys_NC.T.contiguous())
        self.register_buffer("half_squares_N", keys_NC.square().sum(1) / 2)

    def forward(self, index: int, x: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """The state is the sample's row of the plan, then that of the gates."""
        if index == 0:
            # The nearest key: the same order as by squared distance, with one product.
            nearness_BN = x.mean((-2, -1)) @ self.keys_CN - self.half_squares_N
            state = (self.levels_NG[nearness_BN.argmax(1)],)
        levels_BG, *others = state
        score_B, after = self.gates(index, x, tuple(others))
        return score_B + levels_BG[:, index], (levels_BG, *after)


@torch.no_grad()
def planned_network(*, width: int, gates: str, seed: int) -> tuple[SkipNetwork, Tensor, Tensor]:
    """Build an untrained network, samples, and the plan of what they run.

    Args:
        width: Times the channels of the paper's network.
        gates: recurrent or feed_forward.
        seed: Of weights, samples and plan.
    Returns:
        network: In evaluation mode.
        images: Shape (N, 3, 32, 32).
        levels_NG: The plan.
    """
    torch.manual_seed(seed)
    network = skipnet(
        in_channels=3,
        widths=(16 * width, 32 * width, 64 * width),
        blocks=(6, 6, 6),
        num_classes=10,
        gates=gates,
    ).eval()
    # Of several colours, so that pooled features tell them apart.
    images = torch.randn(SAMPLES, 3, 32, 32) + 3 * torch.randn(SAMPLES, 3, 1, 1)
    for layer in network.gates.modules():
        if isinstance(layer, nn.Linear) and layer.out_features == 1:
            layer.weight.mul_(_SCORE_SCALE)
            layer.bias.mul_(_SCORE_SCALE)
    levels_NG = draw_plan(network.num_gates)
    keys_NC = torch.cat([network.stem(batch).mean((-2, -1)) for batch in images.split(64)])
    network.gates = PlannedGates(network.gates, levels_NG, keys_NC)
    return network.eval(), images, levels_NG


def without_plan(network: SkipNetwork) -> SkipNetwork:
    """The same network with its gates as they are.

    Args:
        network: Of :func:`planned_network`.
    Returns:
        A copy, which shares no weights.
    """
    bare = copy.deepcopy(network)
    assert isinstance(bare.gates, PlannedGates)
    bare.gates = bare.gates.gates
    return bare


def draw_plan(num_gates: int) -> Tensor:
    """Draw which blocks each sample runs; any number of samples from the first on runs its share.

    Args:
        num_gates: Gates.
    Returns:
        What to add to each score, shape (N, G).
    """
    rows = []
    for sample in range(SAMPLES):
        often, seldom = (
            int((sample + 1) * share * num_gates + 1e-9) - int(sample * share * num_gates + 1e-9)
            for share in SHARES
        )
        ordered = torch.tensor(
            [_LEVELS[0]] * seldom
            + [_LEVELS[1]] * (often - seldom)
            + [_LEVELS[2]] * (num_gates - often)
        )
        rows.append(ordered[torch.randperm(num_gates)])
    return torch.stack(rows)


def planned_blocks(levels_NG: Tensor, threshold: float) -> Tensor:
    """Which blocks run at a threshold, shape (N, G), bool."""
    return levels_NG.sigmoid() > threshold
