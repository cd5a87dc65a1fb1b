"""Residual networks taken apart into stem, blocks and head; and the way around a block.

Known: ours with one exit, torchvision's ``ResNet`` and timm's, of basic and bottleneck blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from offramp.errors import BackboneCutError
from offramp.model.multi_exit import MultiExitNetwork

_GROUPS = ("layer1", "layer2", "layer3", "layer4")


class ResidualParts(NamedTuple):
    """A residual network in order.

    Attributes:
        stem: In front of the first block.
        blocks: The residual blocks.
        head: Behind the last.
    """

    stem: nn.Module
    blocks: tuple[nn.Module, ...]
    head: nn.Module


def take_apart(resnet: nn.Module) -> ResidualParts:
    """Find stem, blocks and head."""
    if isinstance(resnet, MultiExitNetwork) and resnet.num_exits == 1:
        stage, head = resnet.stages[0], resnet.exits[0]
        if type(stage) is nn.Sequential:
            parts = list(stage)
            start = next((i for i, part in enumerate(parts) if is_block(part)), len(parts))
            if all(is_block(part) for part in parts[start:]):
                return ResidualParts(nn.Sequential(*parts[:start]), tuple(parts[start:]), head)
    elif all(hasattr(resnet, name) for name in (*_GROUPS, "conv1", "bn1", "maxpool", "fc")):
        blocks = tuple(block for name in _GROUPS for block in getattr(resnet, name))
        if all(is_block(block) for block in blocks):
            return ResidualParts(_stem_of(resnet), blocks, _head_of(resnet))
    raise BackboneCutError(
        "Expected a residual network whose parts are known: ours with one exit (variant=plain), "
        f"torchvision's ResNet or timm's. Got {type(resnet).__name__}: build a SkipNetwork from "
        "its stem, blocks and head."
    )


def _stem_of(resnet: nn.Module) -> nn.Module:
    activation = resnet.act1 if hasattr(resnet, "act1") else resnet.relu
    return nn.Sequential(resnet.conv1, resnet.bn1, activation, resnet.maxpool)  # type: ignore[arg-type]


def _head_of(resnet: nn.Module) -> nn.Module:
    """The pooling of timm flattens by itself; a second time changes nothing."""
    pool = resnet.global_pool if hasattr(resnet, "global_pool") else resnet.avgpool
    dropout = nn.Dropout(float(getattr(resnet, "drop_rate", 0.0)))
    return nn.Sequential(pool, nn.Flatten(), dropout, resnet.fc)  # type: ignore[arg-type]


def is_block(module: nn.Module) -> bool:
    """Whether a module is a residual block: one with a shortcut that is known."""
    return hasattr(module, "shortcut") or hasattr(module, "downsample")


def skip_block(block: nn.Module, x: Tensor) -> Tensor:
    """Go around a residual block, as if what it adds were zero."""
    shortcut = _shortcut(block)
    if isinstance(shortcut, nn.Identity):
        return x
    y: Tensor = _last_activation(block)(shortcut(x))
    return y


@contextmanager
def adding_nothing(block: nn.Module) -> Iterator[None]:
    """Set the weights of what a block adds to its shortcut to zero inside the block."""
    around = {id(p) for p in _shortcut(block).parameters()}
    weights = [p.data for p in block.parameters() if id(p) not in around]
    saved = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            weight.zero_()
        yield
    finally:
        for weight, value in zip(weights, saved, strict=True):
            weight.copy_(value)


def _shortcut(block: nn.Module) -> nn.Module:
    shortcut = getattr(block, "shortcut", None) or getattr(block, "downsample", None)
    return shortcut if isinstance(shortcut, nn.Module) else nn.Identity()


def _last_activation(block: nn.Module) -> nn.Module:
    names = ("activation", "act3", "act2", "relu")
    activation: nn.Module = next(getattr(block, name) for name in names if hasattr(block, name))
    return activation


def channels_into(block: nn.Module) -> int:
    """Channels that a residual block reads."""
    return next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
