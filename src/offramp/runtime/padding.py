"""Batches of unequal length in numpy: padding that every sample of a batch has is cut off.

The same as ``offramp.model.ragged``, without torch.

Shapes: ``B`` batch, ``T`` tokens of the longest sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import ShapeError
from offramp.runtime.bundle import Padding
from offramp.runtime.files import TensorSpec

Array = npt.NDArray[Any]


def mask_of_inputs(padding: Padding, inputs: Sequence[Array]) -> Array:
    """Mark what is no padding in a network's inputs."""
    if padding.pad_id is not None:
        is_token_BT: Array = inputs[0] != padding.pad_id
        return is_token_BT
    mask_BT: Array = inputs[padding.mask_index] != 0
    return mask_BT


def require_first_tokens(mask_BT: Array) -> None:
    """Make sure that samples are padded at their ends: it is the first token that answers."""
    begins_late_B = mask_BT.any(1) & ~mask_BT[:, 0]
    if begins_late_B.any():
        raise ShapeError(
            "Expected padding behind the tokens, since the first one answers. Got some before "
            f"the tokens of sample {int(begins_late_B.argmax())}: pad at the end."
        )


def trim_tokens(
    tensors: Sequence[Array], specs: Sequence[TensorSpec], mask_BT: Array
) -> list[Array]:
    """Cut off the last tokens that are padding in every sample."""
    used = np.flatnonzero(mask_BT.any(0))
    longest = int(used[-1]) + 1 if len(used) else 1
    if longest == mask_BT.shape[1]:
        return list(tensors)
    cut = [
        np.ascontiguousarray(tensor[:, :longest]) if spec.has_tokens else tensor
        for tensor, spec in zip(tensors, specs, strict=False)
    ]
    return [*cut, *tensors[len(specs) :]]
