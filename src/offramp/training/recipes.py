"""Recipes: ready-made arguments to ``fit``, by name, and how ``--set`` changes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.model.multi_exit import MultiExitNetwork
from offramp.training.config import FitConfig
from offramp.training.data import Normalisation, RandomWarp
from offramp.training.sources import SOURCES, nearest
from offramp.zoo import NETWORKS, build

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
        """Normalisation of pixels, where there are pixels.

        Raises:
            ArtifactError: If the recipe says none, though its data are images.
        """
        if self.normalisation is None:
            raise ArtifactError(
                f"The recipe {self.name!r} has no normalisation for the images of {self.data}. "
                "Train the run again."
            )
        return self.normalisation

    def options_as_built(self) -> dict[str, Any]:
        """The network's options with the variant taken into account."""
        options = dict(self.network_options)
        if self.variant == "static":
            options.update(self.static_options)
        if self.variant != "adaptive":
            options["num_exits"] = 1
        return options

    def config_as_trained(self) -> FitConfig:
        """How to train with the variant taken into account: one exit needs no exit's settings."""
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
        )

    def build_network(self) -> MultiExitNetwork:
        """Build the network, freshly initialised from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.fit.seed)
            return build(self.network, self.options_as_built())

    def to_dict(self) -> dict[str, Any]:
        """Describe the recipe in values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """Rebuild a recipe from :meth:`to_dict`.

        Args:
            content: The dictionary.
        Returns:
            The recipe.
        Raises:
            ArtifactError: If the dictionary is damaged.
        """
        try:
            augment, pixels = content["augment"], content["normalisation"]
            config = dict(content["fit"])
            if config["loss_weights"] is not None:
                config["loss_weights"] = tuple(config["loss_weights"])
            parts = {
                "normalisation": None if pixels is None else Normalisation(**pixels),
                "augment": None if augment is None else RandomWarp(**augment),
                "fit": FitConfig(**config),
            }
            recipe = cls(**{**content, **parts})
            if not isinstance(recipe.network_options, Mapping):
                raise ValueError(f"network_options {recipe.network_options!r}")
            if recipe.data not in SOURCES or recipe.network not in NETWORKS:
                raise ValueError(f"unknown data {recipe.data!r} or network {recipe.network!r}")
            return recipe
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"Expected a recipe, got a damaged one ({error}).") from error


_TUTORIAL = FitConfig(
    epochs=15,
    batch_size=256,
    optimizer="adam",
    learning_rate=0.003,
    weight_decay=0.0,
    loss_weights=(0.33, 0.33, 0.33),
    detach=True,
)

_FINE_TUNE = FitConfig(
    epochs=5,
    batch_size=32,
    learning_rate=1e-4,
    loss_weights=(0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    backbone_epochs=1,
    distillation=0.5,
)


def _minilm(name: str, *, summary: str, expected: str, data: str, num_classes: int) -> Recipe:
    """MiniLM fine-tuned on labelled texts."""
    return Recipe(
        name=name,
        summary=summary,
        expected=expected,
        data=data,
        network="minilm",
        network_options={
            "num_classes": num_classes,
            "depth": 6,
            "exits_after": (1, 2, 3, 4, 5),
        },
        static_options={"depth": 3},
        calibration_share=0.15,
        fit=_FINE_TUNE,
    )


_CIFAR10_PIXELS = Normalisation(mean=0.473, deviation=0.251)
_SHIFT_AND_MIRROR = RandomWarp(degrees=0.0, scale=0.0, shear=0.0, shift=4.0, mirror=True)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="digits-mlp",
            summary="three exits on scikit-learn's 1,797 digits; works offline in seconds",
            expected="96 % on test at under 1 % of the plain network's MACs",
            data="digits",
            network="mlp",
            network_options={"in_features": 64, "widths": (24, 256, 2048), "num_classes": 10},
            static_options={"widths": (24, 32, 32)},
            normalisation=Normalisation(mean=0.5, deviation=0.5),
            augment=RandomWarp(degrees=8.0, scale=0.05, shear=0.05, shift=0.5),
            calibration_share=0.2,
            fit=FitConfig(epochs=30, batch_size=64, learning_rate=0.002),
        ),
        Recipe(
            name="emnist-mlp",
            summary="the well-known tutorial: three linear stages, entropy thresholds by hand",
            expected="about 77 / 82 / 82.5 % per exit, 82.5 % at 1.9 M MACs with 0.1,0.5 nats",
            data="emnist47",
            network="mlp",
            network_options={"in_features": 784, "widths": (1024, 1024, 1024), "num_classes": 47},
            static_options={"widths": (896, 896, 448)},
            normalisation=Normalisation(mean=0.5, deviation=0.5),
            calibration_share=0.0,
            fit=_TUTORIAL,
        ),
        Recipe(
            name="emnist-convnet",
            summary="a convolutional network, four exits: more accurate, far cheaper",
            expected="89.5 % at 1.4 M mean MACs, 88.5 % at 0.39 M",
            data="emnist47",
            network="convnet",
            network_options={
                "in_channels": 1,
                "side": 28,
                "stages": (
                    (("conv", 16, 2), ("separable", 24, 1), ("separable", 64, 2)),
                    (("separable", 64, 1),),
                    (("separable", 96, 1), ("separable", 96, 1)),
                    (("separable", 160, 1), ("separable", 160, 1)),
                ),
                "num_classes": 47,
            },
            static_options={
                "stages": (
                    (("conv", 16, 2), ("separable", 24, 1), ("separable", 64, 2)),
                    (("separable", 64, 1),),
                    (("separable", 96, 1), ("separable", 120, 1)),
                ),
            },
            normalisation=Normalisation(mean=0.5, deviation=0.5),
            augment=RandomWarp(degrees=8.0, scale=0.08, shear=0.1, shift=2.0, elastic=0.6),
            calibration_share=0.02,
            uniform_prior=True,
            fit=FitConfig(
                epochs=30,
                learning_rate=0.004,
                loss_weights=(0.2, 0.3, 0.5, 1.0),
                backbone_epochs=5,
                label_smoothing=0.1,
                class_balance="sampling",
            ),
        ),
        Recipe(
            name="cifar10-resnet",
            summary="a residual network for small colour images, four exits",
            expected="62, 83, 89, 89 % per exit, 88.0 % at 24 M of 40 M MACs; trains in an hour",
            data="cifar10",
            network="resnet",
            network_options={
                "in_channels": 3,
                "widths": (24, 48, 96, 160),
                "blocks": (0, 1, 2, 2),
                "exits_after": (1, 2, 3),
                "num_classes": 10,
            },
            static_options={"widths": (16, 36, 72, 120)},
            normalisation=_CIFAR10_PIXELS,
            augment=_SHIFT_AND_MIRROR,
            calibration_share=0.1,
            fit=FitConfig(
                epochs=30,
                batch_size=128,
                optimizer="sgd",
                learning_rate=0.1,
                weight_decay=5e-4,
                loss_weights=(0.3, 0.5, 0.7, 1.0),
                backbone_epochs=7,
                distillation=0.5,
            ),
        ),
        Recipe(
            name="cifar10-lite0",
            summary="EfficientNet-Lite0 pretrained on ImageNet, images enlarged, four exits",
            expected="not measured yet",
            data="cifar10",
            network="lite0",
            network_options={
                "num_classes": 10,
                "image_side": 32,
                "side": 80,
                "exits_after": (2, 3, 4),
            },
            static_options={"side": 64},
            normalisation=Normalisation(mean=127 / 255, deviation=128 / 255),
            augment=_SHIFT_AND_MIRROR,
            calibration_share=0.1,
            fit=FitConfig(
                epochs=8,
                batch_size=64,
                learning_rate=5e-4,
                loss_weights=(0.3, 0.5, 0.7, 1.0),
                backbone_epochs=2,
                distillation=0.5,
            ),
        ),
        _minilm(
            "sst2-minilm",
            summary="film reviews, good or bad: pretrained MiniLM, an exit after each layer",
            expected="88.9 % at 48 % of the MACs, 89.3 % at the final exit",
            data="sst2_sentences",
            num_classes=2,
        ),
        _minilm(
            "trec6-minilm",
            summary="what a question asks for: pretrained MiniLM, an exit after each layer",
            expected="not measured yet",
            data="trec6",
            num_classes=6,
        ),
        Recipe(
            name="resnet18-32",
            summary="ResNet-18 for 32x32 images, three exits; large enough for the clock",
            expected="milliseconds, by benchmarks/clock.py; training takes a GPU",
            data="cifar10",
            network="resnet",
            network_options={
                "in_channels": 3,
                "widths": (64, 128, 256, 512),
                "blocks": (2, 2, 2, 2),
                "exits_after": (2, 4),
                "num_classes": 10,
            },
            static_options={"widths": (48, 96, 192, 384)},
            normalisation=_CIFAR10_PIXELS,
            augment=_SHIFT_AND_MIRROR,
            calibration_share=0.1,
            fit=FitConfig(epochs=60, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4),
        ),
    )
}
"""The recipes that ship, by name."""


def find_recipe(name: str) -> Recipe:
    """Look a recipe up.

    Args:
        name: A key of :data:`RECIPES`.
    Returns:
        The recipe.
    Raises:
        InvalidArgumentError: If there is none of that name; the message names the nearest.
    """
    if name not in RECIPES:
        raise InvalidArgumentError(
            f"There is no recipe {name!r}. Did you mean {nearest(name, list(RECIPES))!r}? "
            "See: offramp recipes"
        )
    return RECIPES[name]
