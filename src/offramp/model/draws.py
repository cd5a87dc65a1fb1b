"""Random inputs of the shape and kind of an example.

Shapes: ``B`` batch, ``T`` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offramp.model.multi_exit import Features

Range = Literal["any", "example's", "example"]

RANGES: tuple[Range, ...] = ("any", "example's", "example")
"""Sources of values: any of the kind; within the example's range; the example itself."""

_SCALES = ((1.0, 0.0), (0.5, -1.0), (2.0, 1.0))
"""Deviation and mean of normal draws, sample by sample in turn, so that sums are of either sign."""


def draw(
    example: Features,
    num: int,
    vocabularies: Sequence[int | None],
    within: Range,
    *,
    first: int = 0,
) -> Features:
    """Draw inputs from torch's global generator."""
    has_ids = any(not (t.is_floating_point() or t.is_complex()) for t in example)
    drawn = []
    for tensor, vocabulary in zip(example, vocabularies, strict=True):
        rows = tensor[torch.arange(num) % len(tensor)]
        if within == "example":
            drawn.append(rows)
        elif is_mask(tensor, vocabulary, beside_ids=has_ids and len(example) > 1):
            drawn.append(_mask_like(rows))
        elif tensor.is_floating_point() or tensor.is_complex():
            drawn.append(_floats_like(tensor, rows, within, first))
        else:
            drawn.append(_integers_like(tensor, rows, vocabulary, within))
    return tuple(drawn)


def is_mask(tensor: Tensor, vocabulary: int | None, *, beside_ids: bool) -> bool:
    """Tell a mask, which must not be the same everywhere, from data."""
    if tensor.dtype == torch.bool:
        return tensor.ndim > 1
    if vocabulary is not None or tensor.ndim != 2 or tensor.is_complex():
        return False
    if tensor.is_floating_point() and not beside_ids:
        return False
    return bool(((tensor == 0) | (tensor == 1)).all())


def vocabularies_of(backbone: nn.Module, inputs: Features) -> list[int | None]:
    """Find how many ids each input may hold: the smallest embedding that reads it."""
    sizes: list[int | None] = [None] * len(inputs)
    given = tuple(tensor.clone() for tensor in inputs)
    if not any(_may_be_ids(tensor) for tensor in inputs):
        return sizes
    places = [tensor.untyped_storage().data_ptr() for tensor in given]

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            place = args[0].untyped_storage().data_ptr()
            size: int = module.num_embeddings  # type: ignore[assignment]
            for i, tensor in enumerate(given):
                if places[i] == place and _may_be_ids(tensor):
                    sizes[i] = min(size, sizes[i] or size)

    embeddings = [m for m in backbone.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    hooks = [module.register_forward_pre_hook(note) for module in embeddings]
    try:
        if embeddings:
            backbone(*given)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


def _may_be_ids(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


def _mask_like(rows: Tensor) -> Tensor:
    """Masks of two parts. Of bool either value may mean padding; of numbers it is 0, at the end."""
    length = rows.shape[-1]
    if length == 1:
        return rows
    kept = torch.randint(1, length, (*rows.shape[:-1], 1), device=rows.device)
    is_kept = torch.arange(length, device=rows.device) < kept
    first = rows[..., :1] if rows.dtype == torch.bool else torch.ones_like(rows[..., :1])
    return torch.where(is_kept, first, 1 - first if rows.dtype != torch.bool else ~first)


def _floats_like(tensor: Tensor, rows: Tensor, within: Range, first: int) -> Tensor:
    if not bool(tensor.isfinite().all()):
        return rows  # such as a mask of 0 and -inf, which is added
    if within == "example's" and not tensor.is_complex():
        lowest, highest = tensor.aminmax()
        return lowest + (highest - lowest) * torch.rand_like(rows)
    scales = torch.tensor([_SCALES[(first + i) % len(_SCALES)] for i in range(len(rows))])
    deviation, mean = scales.to(rows).reshape(-1, 2, *(1,) * (rows.ndim - 1)).unbind(1)
    return deviation * torch.randn_like(rows) + mean


def _integers_like(tensor: Tensor, rows: Tensor, vocabulary: int | None, within: Range) -> Tensor:
    if within == "any" and vocabulary is not None:
        return torch.randint_like(rows, vocabulary)
    if within == "any" and tensor.dtype == torch.uint8:
        return torch.randint_like(rows, 256)
    # Any order of the example's own values.
    values = tensor.flatten()
    return values[torch.randint(len(values), rows.shape, device=rows.device)]
