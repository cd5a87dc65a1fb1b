"""Outputs of a network: a class for a sample (labels), or one for every pixel (maps).

Code in higher layers that needs more of a kind keeps a table of its own by the record's name.

Shapes: ``B`` batch, ``C`` classes, ``H W`` pixels of the labels, ``h w`` cells of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

IGNORED_LABEL = 255
"""Label of pixels that nobody is asked about: left out of losses, figures and calibration."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """A kind of outputs.

    Attributes:
        name: By which tables know it.
        logit_axes: Axes of one sample's logits.
        label_axes: Axes of a batch of labels.
        one_for_each: What has a class of its own.
        label_names: Names under which a dict may hold such labels, beside those of any labels.
        qualities: Figures that answers are judged by, by their keys, what counts most first.
        settings: What only the training of such networks can be told.
        predict: From raw logits and labels to classes, shaped as the labels are; of maps, tensors.
    """

    name: str
    logit_axes: tuple[str, ...]
    label_axes: tuple[str, ...]
    one_for_each: str
    label_names: tuple[str, ...]
    qualities: tuple[str, ...]
    settings: tuple[str, ...]
    predict: Callable[[Any, Any], Any]


def _likeliest_of_pixels(logits_BChw: Any, labels_BHW: Any) -> Any:
    from offramp.measure.dense import maps_of  # torch

    return maps_of(logits_BChw, (labels_BHW.shape[1], labels_BHW.shape[2]))


LABELS = Outputs(
    name="labels",
    logit_axes=("C",),
    label_axes=("B",),
    one_for_each="sample",
    label_names=(),
    qualities=("accuracy",),
    settings=(),
    predict=lambda logits_BC, labels_B: logits_BC.argmax(-1),
)
"""One class a sample: logits (B, C)."""

MAPS = Outputs(
    name="maps",
    logit_axes=("C", "H", "W"),
    label_axes=("B", "H", "W"),
    one_for_each="pixel",
    label_names=("mask", "masks", "annotation", "segmentation"),
    qualities=("mean_iou", "accuracy"),
    settings=("class_weights",),
    predict=_likeliest_of_pixels,
)
"""A map of classes, one for every pixel: logits (B, C, h, w), as coarse as the network likes."""

OUTPUTS = (LABELS, MAPS)
"""Every kind."""

QUALITY_NAMES = {"mean_iou": "mean IoU", "accuracy": "accuracy"}
"""Figures that answers are judged by, in words."""


def outputs_of(logits: Any) -> Outputs:
    """Find the outputs that a batch of logits says."""
    return next(each for each in OUTPUTS if 1 + len(each.logit_axes) == logits.ndim)


def outputs_judged_by(figures: Mapping[str, Any]) -> Outputs:
    """Find the outputs whose most important figure is among these."""
    known = [each for each in (MAPS, LABELS) if figures.get(each.qualities[0]) is not None]
    return (*known, LABELS)[0]


def shape_in_words(axes: Sequence[str]) -> str:
    """Write axes as Python writes a shape."""
    return f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"


class SaysClasses:
    """A network that says classes: labels, unless it says otherwise."""

    @property
    def outputs(self) -> Outputs:
        """Labels or maps."""
        return LABELS

    @property
    def is_dense(self) -> bool:
        """True if it says a class for every pixel: logits of shape (B, C, h, w)."""
        return self.outputs is MAPS
