"""Batches of unequal length: padding that every sample of a batch has is cut off.

Shapes: ``B`` batch, ``T`` tokens of the longest sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """The place where a network of tokens marks padding.

    Attributes:
        mask_index: Number of the tensor, among the features that cross a cut, that is 0 on
            padding, shape (B, T); all tensors with a token axis have it second.
        pad_id: Value of the padding in the network's only input, shape (B, T); None for a network
            whose inputs hold a mask, at the same number.
    """

    mask_index: int
    pad_id: int | None = None

    def mask_of_inputs(self, inputs: Tensors) -> Tensor:
        """Mask of the network's inputs, shape (B, T), bool: True where there is no padding."""
        if self.pad_id is not None:
            return inputs[0] != self.pad_id
        return inputs[self.mask_index] != 0

    def lengths(self, inputs: Tensors) -> Tensor:
        """Tokens of each sample that are no padding, shape (B,), int64."""
        return self.mask_of_inputs(inputs).sum(1)

    def trim_inputs(self, inputs: Tensors) -> Tensors:
        """The network's inputs without padding that all samples have."""
        return trim_tokens(inputs, self.mask_of_inputs(inputs))

    def trim_features(self, features: Tensors) -> Tensors:
        """Features without padding that all samples have."""
        return trim_tokens(features, features[self.mask_index] != 0)


def trim_tokens(tensors: Tensors, mask_BT: Tensor) -> Tensors:
    """Cut off the last tokens that are padding in every sample."""
    num_tokens = mask_BT.shape[1]
    positions_T = torch.arange(1, num_tokens + 1, device=mask_BT.device)
    longest = max(1, int((mask_BT.any(0) * positions_T).amax()))  # the one wait for the device
    if longest == num_tokens:
        return tensors
    return tuple(
        tensor[:, :longest] if tensor.ndim > 1 and tensor.shape[1] == num_tokens else tensor
        for tensor in tensors
    )
