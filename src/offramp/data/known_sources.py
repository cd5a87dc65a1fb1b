"""The data sets that recipes can name: their splits, their pictures, their classes. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from offramp.errors import DataError
from offramp.runtime.preprocessing import Preprocessing


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data set that recipes can name.

    Attributes:
        splits: Names of its splits.
        image_shape: Channels, height, width; None for texts.
        class_names: Where the files do not say them.
        ignored_label: Of masks, which give every pixel a class: the number that stands for none;
            None where an image has one class.
        transposed: Whether height and width are swapped against an upright image.
        light_on_dark: Whether strokes are light on a dark ground; images with a light ground are
            inverted.
        ink_margin: Blank border around the strokes, as a share of the side.
        download: What ``--data`` takes to download it; None where it needs no download.
    """

    splits: tuple[str, ...]
    image_shape: tuple[int, int, int] | None
    class_names: tuple[str, ...] = ()
    ignored_label: int | None = None
    transposed: bool = False
    light_on_dark: bool = False
    ink_margin: float = 0.0
    download: str | None = None

    def preprocessing(self, *, mean: float = 0.0, deviation: float = 1.0) -> Preprocessing:
        """Return the way from a picture to an input of a network that was trained on the data.

        Pictures of another size are cut to their ink (data of strokes) or to the middle square
        (others, but for scenes with masks).
        """
        if self.image_shape is None:
            raise DataError("Expected data of images to prepare pictures for. Got data of texts.")
        channels, height, width = self.image_shape
        is_scene = self.ignored_label is not None
        return Preprocessing(
            height=height,
            width=width,
            channels=1 if channels == 1 else 3,
            resize="ink_square"
            if self.light_on_dark
            else "stretch"
            if is_scene
            else "middle_square",
            interpolation="lanczos",
            mean=mean,
            deviation=deviation,
            light_on_dark=self.light_on_dark,
            ink_margin=self.ink_margin,
            transposed=self.transposed,
        )

    @property
    def judging_split(self) -> str:
        """The split that figures are on where none is named: the last."""
        return self.splits[-1]


EMNIST_BALANCED = "emnist-balanced"
"""Given as ``--data``: download the official EMNIST Balanced split through torchvision."""

SOURCES = {
    "digits": DataSource(splits=("train", "test"), image_shape=(1, 8, 8), light_on_dark=True),
    "emnist47": DataSource(
        splits=("train", "test"),
        image_shape=(1, 28, 28),
        transposed=True,
        light_on_dark=True,
        ink_margin=2 / 28,
        download=EMNIST_BALANCED,
    ),
    "cifar10": DataSource(splits=("train", "test"), image_shape=(3, 32, 32)),
    "camvid": DataSource(
        splits=("train", "val"),
        image_shape=(3, 180, 240),
        class_names=(
            *("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence"),
            *("Car", "Pedestrian", "Bicyclist"),
        ),
        ignored_label=11,
    ),
    "sst2_sentences": DataSource(
        splits=("train", "validation", "test"),
        image_shape=None,
        class_names=("negative", "positive"),
    ),
    "trec6": DataSource(
        splits=("train", "test"),
        image_shape=None,
        class_names=("description", "entity", "abbreviation", "human", "location", "number"),
    ),
}
