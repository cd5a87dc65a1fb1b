"""Token ids, attention mask and token types: told apart by name, and by value where by position.

Shapes: ``B`` batch, ``T`` tokens of the longest sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.model.ragged import Ragged
from offramp.model.tensors import listed, to_tensor, type_name

Tensors = tuple[Tensor, ...]

TEXT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
"""Inputs of a text model, in the order in which it takes them; tokenizers return another one."""

_UNKNOWN_TO_EXITS = ("inputs_embeds", "position_ids", "head_mask")


def named_texts(given: Mapping[Any, Any], ragged: Ragged) -> Tensors:
    """Pick token ids, mask and token types out of a dict, as far as a network takes them."""
    foreign = [name for name in _UNKNOWN_TO_EXITS if given.get(name) is not None]
    if given.get(TEXT_NAMES[0]) is None or foreign:
        raise InvalidArgumentError(
            f"Expected a dict with {', '.join(TEXT_NAMES)}, of which the first is needed. "
            f"Got the keys {listed(given)}."
        )
    ids, mask, types = (
        None if given.get(name) is None else to_tensor(given[name]) for name in TEXT_NAMES
    )
    assert ids is not None
    if ragged.pad_id is not None:
        return (_padded_ids(ids, mask, types, ragged.pad_id),)
    mask = torch.ones_like(ids) if mask is None else mask
    return (ids, mask) if types is None else (ids, mask, types)


def _padded_ids(
    ids_BT: Tensor, mask_BT: Tensor | None, types: Tensor | None, pad_id: int
) -> Tensor:
    """Ids for a network that knows padding by its id, which the mask must agree with."""
    if types is not None and bool(types.any()):
        raise InvalidArgumentError(
            "Expected texts of one token type. Got token_type_ids other than 0, which this network "
            "does not take."
        )
    if mask_BT is None:
        return ids_BT
    _check_texts((ids_BT, mask_BT))
    _check_mask(mask_BT, ids_BT)
    is_padding_BT = mask_BT == 0
    if bool(((ids_BT == pad_id) & ~is_padding_BT).any()):
        raise InvalidArgumentError(
            f"Expected an attention mask of 0 where the id is {pad_id}, which is padding to this "
            "network. Got a mask of 1 there."
        )
    return ids_BT.masked_fill(is_padding_BT, pad_id)


def as_texts(inputs: Tensors, ragged: Ragged) -> Tensors:
    """Check token ids and their mask, which is made of ones where there is none."""
    _check_texts(inputs)
    if ragged.pad_id is not None:
        if len(inputs) > 1:
            raise ShapeError(f"Expected one input, token ids of texts. Got {len(inputs)}.")
        return (inputs[0].long(),)
    ids_BT, *rest = inputs
    mask_BT = rest[0] if rest else torch.ones_like(ids_BT)
    _check_mask(mask_BT, ids_BT)
    if len(inputs) > 2 and _could_be_mask(inputs[2]):
        raise InvalidArgumentError(
            f"Expected token types that are 0 at a text's first token, as {TEXT_NAMES[2]} are in "
            f"the order {', '.join(TEXT_NAMES)}. Got what could be a mask: pass a dict with these "
            "names."
        )
    return tuple(tensor.long() for tensor in (ids_BT, mask_BT, *rest[1:]))


def _could_be_mask(tensor_BT: Tensor) -> bool:
    """Return True if every text has ones, then zeros."""
    starts, goes_on = tensor_BT[:, 0] == 1, tensor_BT.long().diff(dim=1)
    return bool(starts.all()) and bool(((goes_on == 0) | (goes_on == -1)).all())


def with_types(inputs: Tensors, num_inputs: int) -> Tensors:
    """Add token types of 0 where a network takes types, and leave those of 0 out where not."""
    if num_inputs == 3 and len(inputs) == 2:
        return (*inputs, torch.zeros_like(inputs[0]))
    if num_inputs < len(inputs) == 3 and not bool(inputs[2].any()):
        return inputs[:2]
    return inputs


def _check_texts(inputs: Tensors) -> None:
    if len(inputs) > len(TEXT_NAMES) or inputs[0].ndim != 2:
        raise ShapeError(
            f"Expected token ids of shape (B, T), and {' and '.join(TEXT_NAMES[1:])} of the same "
            f"where there are any. Got {', '.join(str(tuple(t.shape)) for t in inputs)}."
        )
    if any(tensor.shape != inputs[0].shape for tensor in inputs):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise ShapeError(f"Expected {', '.join(TEXT_NAMES)} of one shape (B, T). Got {shapes}.")
    if inputs[0].is_floating_point():
        raise InvalidArgumentError(
            f"Expected token ids, which are whole numbers. Got {type_name(inputs[0].dtype)}."
        )


def _check_mask(mask_BT: Tensor, ids_BT: Tensor) -> None:
    """Refuse what hides whole texts, or tokens before others that are not all one id's."""
    order = f"Pass a dict; by position, the order is {', '.join(TEXT_NAMES)}."
    if not bool(((mask_BT == 0) | (mask_BT == 1)).all()):
        raise InvalidArgumentError(
            "Expected an attention mask of 0 and 1. "
            f"Got values from {mask_BT.min().item()} to {mask_BT.max().item()}. {order}"
        )
    is_late_B = mask_BT[:, 0] == 0
    if bool(is_late_B.any()) and not _pads_left(mask_BT[is_late_B], ids_BT[is_late_B]):
        text = int(is_late_B.int().argmax())
        hides = "every" if not bool(mask_BT[text].any()) else "the first"
        raise InvalidArgumentError(
            "Expected texts that begin with a token. "
            f"The attention mask hides {hides} token of text {text}. {order}"
        )


def _pads_left(mask_BT: Tensor, ids_BT: Tensor) -> bool:
    """Return True if every text has zeros, then ones, and all that is hidden is one id."""
    is_in_order = bool((mask_BT.long().diff(dim=1) >= 0).all()) and bool(mask_BT[:, -1].all())
    hidden = ids_BT[mask_BT == 0]
    return is_in_order and bool((hidden == hidden[0]).all())
