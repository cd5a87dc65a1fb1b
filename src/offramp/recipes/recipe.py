"""The recipe: ready-made arguments to ``fit``, and all that decides how a run is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from offramp.data.images import Normalisation, RandomWarp
from offramp.data.known_sources import SOURCES
from offramp.data.texts import PAD_ID
from offramp.decoding import decode
from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.runtime.preprocessing import AnyPreprocessing, TextPreprocessing
from offramp.training.config import FitConfig
from offramp.zoo import NETWORKS, Network, build
from offramp.zoo.text import load_tokenizer

Variant = Literal["adaptive", "plain", "static"]


def _as_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_tuples(item) for key, item in value.items()}
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a run is trained.

    Attributes:
        name: What ``offramp train`` calls it.
        summary: What it shows, in a line.
        expected: Figures to expect, in a line.
        data: Name of the data set.
        network: Name of the network in the zoo.
        network_options: Its options.
        static_options: What differs for the smaller plain network of the same mean MACs.
        normalisation: Of pixels; None for texts.
        augment: Of training images; None for none.
        calibration_share: Share of train set aside to choose thresholds on; 0 for none.
        uniform_prior: Whether calibration data has as many samples of every class; else it has
            the class frequencies of train.
        variant: adaptive; plain (the same backbone with its last classifier only); or static (a
            smaller plain network, the rival of the same mean MACs).
        fit: How to train.
    """

    name: str
    summary: str = field(compare=False)
    expected: str = field(compare=False)
    data: str
    network: str
    network_options: Mapping[str, Any]
    static_options: Mapping[str, Any] = field(default_factory=dict)
    normalisation: Normalisation | None = None
    augment: RandomWarp | None = None
    calibration_share: float
    uniform_prior: bool = False
    variant: Variant = "adaptive"
    fit: FitConfig

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise InvalidArgumentError(
                f"The 'variant' parameter must be one of {', '.join(get_args(Variant))}. "
                f"Got {self.variant!r}."
            )
        if not 0 <= self.calibration_share <= 0.5:
            raise InvalidArgumentError(
                "The 'calibration_share' parameter must be in [0, 0.5]. "
                f"Got {self.calibration_share}."
            )
        # As they come back from JSON or --set: lists stand for tuples.
        for name in ("network_options", "static_options"):
            object.__setattr__(self, name, _as_tuples(getattr(self, name)))

    def require_normalisation(self) -> Normalisation:
        """Normalisation of pixels, where there are pixels."""
        if self.normalisation is None:
            raise ArtifactError(
                f"The recipe {self.name!r} has no normalisation for the images of {self.data}. "
                "Train the run again."
            )
        return self.normalisation

    def preprocessing(self) -> AnyPreprocessing:
        """Return the way from pictures, or texts, to the network's inputs."""
        source = SOURCES[self.data]
        if source.image_shape is None:
            return TextPreprocessing.from_tokenizer(load_tokenizer(), pad_id=PAD_ID)
        pixels = self.require_normalisation()
        return source.preprocessing(mean=pixels.mean, deviation=pixels.deviation)

    def options_as_built(self) -> dict[str, Any]:
        """The network's options with the variant taken into account."""
        options = dict(self.network_options)
        if self.variant == "static":
            options.update(self.static_options)
        if self.variant != "adaptive":
            options["num_exits"] = 1
        return options

    def config_as_trained(self) -> FitConfig:
        """Settings of training for the variant: one exit needs no exit's settings."""
        if self.variant == "adaptive":
            return self.fit
        return replace(
            self.fit,
            loss_weights=None,
            detach=False,
            freeze_backbone=False,
            gradient_equilibrium=False,
            backbone_epochs=0,
            ramp_epochs=0,
            distillation=0.0,
            gates=None,
            halting=None,
        )

    def build_network(self) -> Network:
        """Build the network, freshly initialised from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.fit.seed)
            return build(self.network, self.options_as_built())

    def to_dict(self) -> dict[str, Any]:
        """Describe the recipe in values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe from :meth:`to_dict`."""
        try:
            recipe = decode(content, cls)
            for name, known in (("data", SOURCES), ("network", NETWORKS)):
                if getattr(recipe, name) not in known:
                    raise ArtifactError(f"{name}: unknown {getattr(recipe, name)!r}")
        except ArtifactError as error:
            raise ArtifactError(f"Expected a recipe, got a damaged one ({error}).") from error
        return recipe
