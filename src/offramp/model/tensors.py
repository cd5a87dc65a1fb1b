"""Tensors out of what stands for one: arrays, lists of numbers, samples not stacked yet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.errors import InvalidArgumentError, ShapeError


def stacked(samples: tuple[Tensor, ...]) -> Tensor:
    """Put samples of one size together."""
    sizes = sorted({tuple(sample.shape) for sample in samples})
    if len(sizes) > 1:
        raise ShapeError(
            f"Expected samples of one size in a batch. Got {sizes[0]} and {sizes[1]}: resize, crop "
            "or pad them."
        )
    return torch.stack(samples)


def to_tensor(value: object) -> Tensor:
    """Make a tensor of a tensor, an array, or a list of numbers or of tensors of one size."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and value:
        if all(isinstance(item, Tensor) for item in value):
            return stacked(tuple(value))
        if type(value[0]).__module__.partition(".")[0] == "PIL":
            value = value[0]
    if isinstance(value, np.ndarray | np.generic | list | tuple | int | float):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ShapeError(
                "Expected samples of one size in a batch. Got lists of several: resize, crop or "
                "pad them."
            ) from error
        if array.dtype.kind in "biuf" and array.size:
            return torch.tensor(array)
    raise InvalidArgumentError(_no_tensor(value))


def _no_tensor(value: object) -> str:
    first = value
    while isinstance(first, list | tuple | np.ndarray) and len(first):
        first = first[0]
    if isinstance(first, str | bytes):
        advice = f"text such as {first[:20]!r}: turn it into token ids with a tokenizer first"
    elif type(first).__module__.partition(".")[0] == "PIL":
        advice = "a PIL image: turn it into a tensor first, as torchvision's ToTensor does"
    else:
        advice = f"{type(first).__name__}: turn it into a tensor with the batch axis first"
    return f"Expected inputs as a tensor, a tuple of tensors or a dict of them. Got {advice}."


def type_name(dtype: torch.dtype) -> str:
    """Name a type of tensors, without its package."""
    return str(dtype).removeprefix("torch.")


def listed(names: Iterable[Any]) -> str:
    """List names for a message."""
    return ", ".join(map(repr, names)) or "none"
