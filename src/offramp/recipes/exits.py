"""The recipes that ship, by name."""

from __future__ import annotations

from offramp.data.images import Normalisation, RandomWarp
from offramp.data.sources import nearest
from offramp.errors import InvalidArgumentError
from offramp.recipes.preprocessing import CIFAR10_PIXELS, LETTER_WARP, SHIFT_AND_MIRROR
from offramp.recipes.recipe import Recipe
from offramp.recipes.skip_halting import INSIDE_RECIPES
from offramp.training.config import FitConfig

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


_SCENES = RandomWarp(degrees=5.0, scale=0.5, shear=0.0, shift=20.0, mirror=True, colour=0.4)
_CAMVID_WEIGHTS = (0.5, 0.45, 2.1, 0.4, 1.0, 0.7, 2.0, 2.0, 0.9, 2.6, 3.9)
"""Square roots of the median share of the pixels over the class's own, in train."""

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
            augment=LETTER_WARP,
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
            expected="78, 87, 90, 90 % per exit; 89.7 % at 21 M of 41 M MACs",
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
            normalisation=CIFAR10_PIXELS,
            augment=SHIFT_AND_MIRROR,
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
            expected="92.4 % at 62 % of the MACs, 92.4 % at the final exit",
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
            augment=SHIFT_AND_MIRROR,
            calibration_share=0.1,
            fit=FitConfig(
                epochs=5,
                batch_size=64,
                learning_rate=5e-4,
                loss_weights=(0.3, 0.5, 0.7, 1.0),
                backbone_epochs=1,
                distillation=0.5,
            ),
        ),
        Recipe(
            name="camvid-seg",
            summary="street scenes, a class for every pixel: four exits, from scratch",
            expected="mean IoU 61.3 % at 52 % of the MACs, 61.7 % at the final exit",
            data="camvid",
            network="segmentation",
            network_options={"num_classes": 11, "widths": (32, 64, 128), "stages": 4},
            static_options={"stages": 2},
            normalisation=Normalisation(mean=0.42, deviation=0.3),
            augment=_SCENES,
            calibration_share=0.15,
            fit=FitConfig(
                epochs=140,
                batch_size=8,
                learning_rate=0.002,
                weight_decay=0.02,
                loss_weights=(0.5, 0.7, 0.8, 1.0),
                class_weights=_CAMVID_WEIGHTS,
            ),
        ),
        Recipe(
            name="camvid-lite0",
            summary="street scenes: EfficientNet-Lite0 pretrained on ImageNet, four dense exits",
            expected="mean IoU 65.1 % at 57 % of the MACs, 67.9 % at the final exit",
            data="camvid",
            network="lite0_segmentation",
            network_options={
                "num_classes": 11,
                "padding": "symmetric",
                "exits_after": (2, 3, 4),
            },
            static_options={"exits_after": (2, 3), "last_group": 4, "final_width": 36},
            normalisation=Normalisation(mean=127 / 255, deviation=128 / 255),
            augment=_SCENES,
            calibration_share=0.15,
            fit=FitConfig(
                epochs=120,
                batch_size=8,
                learning_rate=0.001,
                weight_decay=0.02,
                loss_weights=(0.3, 0.5, 0.7, 1.0),
                class_weights=_CAMVID_WEIGHTS,
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
            expected="96.2 % at 51 % of the MACs, 96.6 % at the final exit",
            data="trec6",
            num_classes=6,
        ),
        *INSIDE_RECIPES,
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
            normalisation=CIFAR10_PIXELS,
            augment=SHIFT_AND_MIRROR,
            calibration_share=0.1,
            fit=FitConfig(epochs=60, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4),
        ),
    )
}
"""The recipes that ship, by name."""


def find_recipe(name: str) -> Recipe:
    """Look a recipe up."""
    if name not in RECIPES:
        raise InvalidArgumentError(
            f"There is no recipe {name!r}. Did you mean {nearest(name, list(RECIPES))!r}? "
            "See: offramp recipes"
        )
    return RECIPES[name]
