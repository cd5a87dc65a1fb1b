"""Networks that ship with Offramp, by the name that recipes and run folders use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from offramp.errors import ArtifactError
from offramp.model.multi_exit import MultiExitNetwork
from offramp.routing.halting import HaltingNetwork
from offramp.routing.skip import SkipNetwork
from offramp.zoo.convnet import convnet
from offramp.zoo.lite0 import lite0
from offramp.zoo.lite0_segmentation import lite0_segmentation
from offramp.zoo.mlp import mlp
from offramp.zoo.resnet import resnet
from offramp.zoo.segmentation import segmentation
from offramp.zoo.skipnet import skipnet
from offramp.zoo.text import minilm, skim
from offramp.zoo.vit import vit

Network = MultiExitNetwork | SkipNetwork | HaltingNetwork
"""Whatever a recipe trains and a run folder holds."""

NETWORKS: dict[str, Callable[..., Network]] = {
    "mlp": mlp,
    "convnet": convnet,
    "lite0": lite0,
    "lite0_segmentation": lite0_segmentation,
    "minilm": minilm,
    "resnet": resnet,
    "segmentation": segmentation,
    "skim": skim,
    "skipnet": skipnet,
    "vit": vit,
}
"""Functions that build a network from plain values."""


def build(name: str, options: Mapping[str, Any]) -> Network:
    """Build a network of the zoo."""
    if name not in NETWORKS:
        raise ArtifactError(f"Expected a network of {', '.join(NETWORKS)}. Got {name!r}.")
    try:
        return NETWORKS[name](**options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"The network {name!r} does not take these options: {error}."
        ) from error
