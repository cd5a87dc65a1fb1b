"""Class maps of a segmentation network's exits, drawn side by side.

Shapes: ``C`` channels or classes, ``K`` exits, ``H W`` pixels, ``h w`` cells of logits.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from offramp.measure.dense import at_size, label_maps
from offramp.policy.confidence import top_probability
from offramp.policy.policies import Policy, tempered

Pixels = npt.NDArray[np.uint8]

_LINE = 14
"""Height of a line of text, in pixels."""
_GAP = 4
_INK, _PAPER, _TAKEN = (20, 20, 20), (255, 255, 255), (200, 30, 30)
_UNSURE = 0.35
"""Brightness of pixels that are not sure, as a share of the others'."""


@dataclass(frozen=True, kw_only=True)
class ExitMap:
    """The class map of an exit for an image.

    Attributes:
        exit_index: Its number.
        logits_Chw: Its logits, divided by the policy's temperature, shape (C, h, w).
        confidence: The policy's, in [0, 1].
        is_taken: Whether the image leaves there.
    """

    exit_index: int
    logits_Chw: Tensor
    confidence: float
    is_taken: bool


def class_colours(num_classes: int) -> Pixels:
    """Colours that tell classes apart."""
    hues = [(0.61 * index) % 1 for index in range(num_classes)]  # far from those before
    levels = [0.95 if index % 2 == 0 else 0.65 for index in range(num_classes)]
    colours = [colorsys.hsv_to_rgb(h, 0.7, v) for h, v in zip(hues, levels, strict=True)]
    return (np.array(colours) * 255).round().astype(np.uint8)


def draw_sheet(
    image_CHW: Pixels,
    maps: Sequence[ExitMap],
    class_names: Sequence[str],
    *,
    pixel_threshold: float,
) -> Image.Image:
    """Draw an image and, for each exit, its label map over its sure pixels."""
    height, width = image_CHW.shape[1:]
    num_classes = maps[0].logits_Chw.shape[0]
    colours = class_colours(num_classes)
    columns = len(maps) + 1
    rows = [(width + _GAP) * columns - _GAP, 2 * (height + _GAP + _LINE)]
    legend = _legend(class_names, colours, rows[0])
    sheet = Image.new("RGB", (rows[0], rows[1] + legend.height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    sheet.paste(Image.fromarray(np.moveaxis(image_CHW, 0, 2)), (0, _LINE))
    pen.text((0, 0), "image", _INK)
    pen.text((0, height + _GAP + _LINE), f"pixels surer than {pixel_threshold:g}", _INK)
    for column, each in enumerate(maps, start=1):
        left, below = column * (width + _GAP), height + _GAP + _LINE
        labels, is_sure = _labels_and_sure(each.logits_Chw, (height, width), pixel_threshold)
        taken = ", taken" if each.is_taken else ""
        words = f"exit {each.exit_index}{taken}  {each.confidence:.3f}"
        pen.text((left, 0), words, _TAKEN if each.is_taken else _INK)
        pen.text((left, below), f"{100 * is_sure.mean():.1f} % sure", _INK)
        painted = colours[labels]
        sheet.paste(Image.fromarray(painted), (left, _LINE))
        dimmed = np.where(is_sure[..., None], painted, (painted * _UNSURE).astype(np.uint8))
        sheet.paste(Image.fromarray(dimmed), (left, below + _LINE))
    sheet.paste(legend, (0, rows[1]))
    return sheet


def _labels_and_sure(
    logits_Chw: Tensor, size: tuple[int, int], pixel_threshold: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    labels_HW = label_maps(logits_Chw[None], size)[0].long().numpy()
    top_1HW = top_probability(at_size(logits_Chw[None], size))
    return labels_HW, (top_1HW[0] >= pixel_threshold).numpy()


def _legend(class_names: Sequence[str], colours: Pixels, width: int) -> Image.Image:
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places: list[tuple[int, int]] = []
    x = y = 0
    names = [class_names[i] if i < len(class_names) else str(i) for i in range(len(colours))]
    for name in names:
        needed = _LINE + _GAP + int(pen.textlength(name)) + 3 * _GAP
        if x + needed > width and x:
            x, y = 0, y + _LINE + _GAP
        places.append((x, y))
        x += needed
    legend = Image.new("RGB", (width, y + _LINE + _GAP), _PAPER)
    pen = ImageDraw.Draw(legend)
    for (left, top), name, colour in zip(places, names, colours.tolist(), strict=True):
        pen.rectangle((left, top, left + _LINE - 2, top + _LINE - 2), tuple(colour))
        pen.text((left + _LINE + _GAP, top), name, _INK)
    return legend


@torch.no_grad()
def exit_maps(
    policy: Policy, outputs: Sequence[Tensor], confidences_K: Tensor, taken: int
) -> list[ExitMap]:
    """Gather what exits say of one image."""
    return [
        ExitMap(
            exit_index=k,
            logits_Chw=tempered(output[0], policy.setting(k)).float().cpu(),
            confidence=float(confidences_K[k]),
            is_taken=k == taken,
        )
        for k, output in enumerate(outputs)
        if not bool(confidences_K[k].isnan())
    ]
