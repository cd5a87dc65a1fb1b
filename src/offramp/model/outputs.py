"""Outputs of a backbone: logits for each sample, or for each pixel.

Shapes: ``B`` batch, ``C`` classes, ``h w`` cells of logits, ``H W`` pixels of an image.
"""

from __future__ import annotations

import math
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import InvalidArgumentError
from offramp.measure.cost import evaluation_mode
from offramp.model.axes import channel_axis
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.model.proof import logits_of

_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)
_LARGER = ((1, 3), (2, 1), (3, 2))
"""By how many multiples images are made higher and wider, to try them."""


def check_logits(logits: Tensor, backbone: nn.Module, inputs: Features, num_classes: int) -> None:
    """Refuse a backbone that ends in something else than logits."""
    wrong = _why_no_logits(logits, len(inputs[0]), num_classes)
    if wrong is None and list(logits.shape[1:]).count(num_classes) > 1:
        axis = channel_axis([backbone], [], inputs)
        if axis not in (1, None):
            wrong = "its classes are not on the axis after the batch's: permute it"
    if wrong is not None:
        raise InvalidArgumentError(
            f"Expected a backbone that ends in {num_classes} outputs: logits (B, {num_classes}), "
            f"or (B, {num_classes}, h, w) where pixels have classes. "
            f"Got an output of shape {tuple(logits.shape)}: {wrong}."
        )


def _why_no_logits(logits: Tensor, batch_size: int, num_classes: int) -> str | None:
    shape = tuple(logits.shape)
    if num_classes == 1:
        return "a single logit says no class: give the negative class an output of its own"
    if logits.ndim == 3:
        return "one class for every token is not supported: pool the tokens first"
    if logits.ndim not in (2, 4):
        return "it has other axes"
    if shape[0] != batch_size:
        return f"the example has {batch_size} samples on its first axis"
    if shape[1] != num_classes:
        return "'num_classes' and the last layer must agree"
    if shape[2:] == (1, 1):
        return "flatten it, so that no pixel axes are left"
    if not logits.is_floating_point():
        return f"logits are floats, not {logits.dtype}"
    return None


def find_pixel_multiple(
    network: MultiExitNetwork, backbone: nn.Module, inputs: Features, logits: Tensor
) -> int | None:
    """Find a divisor of the height and width of all images that it takes, by trying."""
    if logits.ndim == 2:
        return None
    if len(inputs) > 1 or inputs[0].ndim != 4:
        raise InvalidArgumentError(
            "Expected a backbone from images (B, channels, H, W), since it says a class for every "
            f"pixel. Got inputs of shape {[tuple(tensor.shape) for tensor in inputs]}."
        )
    (height, width), (final_height, final_width) = inputs[0].shape[2:], logits.shape[2:]
    both = nn.ModuleList([network, backbone])
    with evaluation_mode(both), torch.no_grad(), torch.random.fork_rng():
        for multiple in _MULTIPLES:
            up, right = -(-height // multiple), -(-width // multiple)
            sizes = [((up + i) * multiple, (right + j) * multiple) for i, j in _LARGER]
            if all(
                _cells(network, backbone, inputs[0], size)
                == {(final_height * size[0] / height, final_width * size[1] / width)}
                for size in sizes
            ):
                return multiple
    return math.gcd(height, width)


def _cells(
    network: MultiExitNetwork, backbone: nn.Module, images: Tensor, size: tuple[int, int]
) -> set[Any]:
    """Heights and widths of the exits' logits for an image of this size; none if it fails."""
    image = torch.randn(1, images.shape[1], *size, dtype=images.dtype, device=images.device)
    try:
        with redirect_stderr(StringIO()):  # torch.fx prints where a graph failed
            outputs, expected = network(image.clone()), logits_of(backbone, (image,))
    except Exception:  # whatever a module raises on an image of another size
        return set()
    if not torch.equal(outputs[-1], expected):
        return set()
    return {tuple(logits.shape[2:]) for logits in outputs}
