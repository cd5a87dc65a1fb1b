"""Regimes for the exits' gradients: kept from the backbone, or balanced over the exits behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offramp.model.multi_exit import Features, MultiExitNetwork


def set_training_mode(network: MultiExitNetwork, *, is_frozen: bool = False) -> None:
    """Put a network in training mode, all of it or the exits before the final one only.

    What is frozen stays in evaluation mode: BatchNorm normalises by its running statistics and
    leaves them as they are, and dropout drops nothing.
    """
    network.train()
    if is_frozen:
        for module in _frozen_modules(network):  # last: one that an early exit shares is frozen
            module.eval()


@contextmanager
def frozen_backbone(network: MultiExitNetwork) -> Iterator[None]:
    """Let nothing reach the stages and the final exit inside the block.

    Their parameters ask for no gradient there, so that running them builds no graph and no
    optimiser made there holds them. After the block, on an error too, they ask as before.
    """
    frozen = [
        parameter
        for module in _frozen_modules(network)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def head_parameters(network: MultiExitNetwork) -> list[nn.Parameter]:
    """List the parameters that a frozen backbone leaves to be trained."""
    frozen = {id(p) for module in _frozen_modules(network) for p in module.parameters()}
    return [p for head in network.exits[:-1] for p in head.parameters() if id(p) not in frozen]


def _frozen_modules(network: MultiExitNetwork) -> tuple[nn.Module, ...]:
    return network.stages, network.exits[-1]


def balanced_outputs(network: MultiExitNetwork, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Compute every exit's logits so that their gradients are in equilibrium in the backbone.

    Where K exits hang on stage 1 to K, the gradient that reaches stage k is the exit's own times
    1 / (K - k + 1) plus that of the later stages times (K - k) / (K - k + 1). Multiplied out, a
    stage learns from the mean of the weighted losses of the exits behind it, not from their sum,
    so that the first stage's gradient does not grow with the number of exits. The heads' own
    parameters get the whole gradient. Values are those of the network's ``forward``.

    Reference: Li et al. (2019), Improved Techniques for Training Adaptive Deep Networks, section
        on gradient equilibrium; factors as in their code. There only the coarsest of MSDNet's
        feature maps is scaled, the one that its exits read; here every tensor that crosses is.
    """
    features: Features = inputs
    outputs = []
    for k in range(network.num_exits):
        num_behind = network.num_exits - k
        features = scale_gradient(network.run_stage(k, features), 1 / num_behind)
        outputs.append(network.run_exit(k, features))
        features = scale_gradient(features, num_behind - 1)
    return tuple(outputs)


def scale_gradient(features: Features, factor: float) -> Features:
    """Leave features as they are and multiply the gradient that passes back through them.

    Example:
        >>> x = torch.tensor([2.0], requires_grad=True)
        >>> (scaled,) = scale_gradient((x,), 0.25)
        >>> (3 * scaled).backward()
        >>> scaled.item(), x.grad.item()
        (2.0, 0.75)
    """
    return tuple(_scaled(tensor, factor) if tensor.requires_grad else tensor for tensor in features)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    scaled: Tensor = _ScaledGradient.apply(tensor, factor)  # type: ignore[no-untyped-call]
    return scaled


class _ScaledGradient(torch.autograd.Function):
    """Identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.clone()  # no view: what reads it next may work in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradient, None
