"""Losses that train gates by reward, and by labels and reward together (hybrid).

Shapes: ``B`` batch, ``C`` classes, ``G`` gates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.errors import ShapeError

_LEAST_PROBABILITY = 1e-6
"""Below this and above one minus this, the logarithm of a probability is that of the limit."""


def skip_rewards(action_BG: Tensor, alpha: float, weights: Sequence[float] | None = None) -> Tensor:
    """Reward that each gate earns at once: a share of alpha for each block that it skips.

    Reference: Wang et al. (2018), SkipNet, section 3.2: alpha over the number of gates.
    """
    return alpha * _shares(action_BG, weights) * (1 - action_BG)


def run_share(probability_BG: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Share of the gated blocks that would run.

    Example:
        >>> run_share(torch.tensor([[0.5, 1.0]]), weights=(3, 1))
        tensor(0.6250)
    """
    share_G = _shares(probability_BG, weights)
    return (probability_BG.detach() * share_G).sum(1).mean()


def returns_to_go(reward_BG: Tensor, final_B: Tensor) -> Tensor:
    """Return of a gate's decision: its own reward, all later ones, and the final one.

    Example:
        >>> returns_to_go(torch.tensor([[1.0, 2.0]]), torch.tensor([10.0]))
        tensor([[13., 12.]])
    """
    return reward_BG.flip(1).cumsum(1).flip(1) + final_B[:, None]


def reinforce_loss(
    probability_BG: Tensor, action_BG: Tensor, return_BG: Tensor, *, baseline: bool = False
) -> Tensor:
    """A loss whose gradient is that of the mean return, estimated from the actions drawn.

    Reference: Williams (1992), REINFORCE.
    """
    advantage_BG = return_BG.detach()
    if baseline:
        num_samples = len(advantage_BG)
        if num_samples < 2:
            raise ShapeError("A baseline needs a batch of at least two samples. Got one.")
        # Leaving a sample out of its own mean scales the difference to the whole mean.
        scale = num_samples / (num_samples - 1)
        advantage_BG = scale * (advantage_BG - advantage_BG.mean(0))
    p_BG = probability_BG.clamp(_LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    log_probability_BG = torch.where(action_BG > 0.5, p_BG.log(), (1 - p_BG).log())
    return -(advantage_BG * log_probability_BG).sum(1).mean()


def hybrid_loss(
    logits_BC: Tensor,
    labels_B: Tensor,
    probability_BG: Tensor,
    action_BG: Tensor,
    *,
    alpha: float,
    policy_weight: float,
    weights: Sequence[float] | None = None,
    run_target: float = 0.0,
    baseline: bool = False,
    greedy: tuple[Tensor, Tensor] | None = None,
    supervised: bool = True,
) -> Tensor:
    """The supervised loss of a pass with actions drawn, and the policy gradient beside it.

    The final reward is minus the sample's cross entropy.

    Reference: Wang et al. (2018), SkipNet, section 3.3; Rennie et al. (2017), Self-critical
        sequence training, for ``greedy``.
    """
    cross_entropy_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
    if run_target and run_share(probability_BG, weights) <= run_target:
        alpha = 0.0
    rewards_BG = skip_rewards(action_BG, alpha, weights)
    return_BG = returns_to_go(rewards_BG, -cross_entropy_B.detach())
    if greedy is not None:
        greedy_logits_BC, greedy_action_BG = greedy
        final_B = -F.cross_entropy(greedy_logits_BC, labels_B, reduction="none")
        return_BG = return_BG - returns_to_go(
            skip_rewards(greedy_action_BG, alpha, weights), final_B
        )
    policy_loss = reinforce_loss(probability_BG, action_BG, return_BG, baseline=baseline)
    supervised_loss = cross_entropy_B.mean() if supervised else 0.0
    return supervised_loss + policy_weight * policy_loss


def _shares(like_BG: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Each gate's share of all weights."""
    num_gates = like_BG.shape[1]
    weight_G = torch.ones(num_gates) if weights is None else torch.tensor(weights).float()
    return (weight_G / weight_G.sum()).to(like_BG)
