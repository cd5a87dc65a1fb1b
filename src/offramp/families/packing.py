"""Tokens of several samples in one row, of which each attends to its own sample only.

Everything but attention works on each token alone, so that samples of unequal length need no
padding. How attention keeps them apart was measured: ``benchmarks/halting_attention.py``.

Shapes: ``N`` tokens of all samples, ``B`` samples, ``P`` places of their tokens once padded, ``A``
width of all heads together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from offramp.routing.layers import attend

_VECTOR = 16
"""On a CPU torch's attention takes so many tokens at a time and those that are left over one by
one: 31 tokens take twice as long as 32."""
_FEW = 4
"""Tokens that are left over and still take less than padding."""


class Packing:
    """Places of the tokens: one sample after the other.

    For attention, samples of about one length are padded to one that is quick, and share a call.

    Attributes:
        lengths_B: Tokens of each sample, shape (B,), int64.
        starts_B: Number of each sample's first token, shape (B,), int64.
        sample_N: Number of each token's sample, shape (N,), int64.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._num_samples = len(lengths)
        length_B = np.array(lengths)
        start_B = length_B.cumsum() - length_B
        sample_N = np.arange(len(length_B)).repeat(length_B)
        self.lengths_B, self.starts_B, self.sample_N = (
            torch.from_numpy(numbers).to(device) for numbers in (length_B, start_B, sample_N)
        )
        self._is_even = length_B.min() == length_B.max()
        if self._is_even:
            return
        padded_B = (
            _padded(length_B) if device.type == "cpu" else np.full_like(length_B, max(lengths))
        )
        self._groups = [(size, length) for length, size in sorted(Counter(padded_B).items())]
        rows_P, is_token_P, places_N = _lay_out(length_B, start_B, padded_B)
        self._rows_P, self._is_token_P, self._places_N = (
            torch.from_numpy(numbers).to(device) for numbers in (rows_P, is_token_P, places_N)
        )

    def attend(self, query_NA: Tensor, key_NA: Tensor, value_NA: Tensor, num_heads: int) -> Tensor:
        """Attention of each token to those of its own sample."""
        qkv = query_NA, key_NA, value_NA
        if self._is_even:
            query, key, value = (x.reshape(self._num_samples, -1, x.shape[1]) for x in qkv)
            return attend(query, key, value, num_heads).flatten(0, 1)
        qkv_P = [tensor.index_select(0, self._rows_P) for tensor in qkv]
        contexts, first = [], 0
        for shape in self._groups:
            places = slice(first, first := first + shape[0] * shape[1])
            query, key, value = (tensor[places].view(*shape, -1) for tensor in qkv_P)
            is_token = self._is_token_P[places].view(shape)
            context = attend(query, key, value, num_heads, is_key_BT=is_token)
            contexts.append(context.flatten(0, 1))
        return torch.cat(contexts).index_select(0, self._places_N)


def _padded(length_B: np.ndarray) -> np.ndarray:
    """A length for each sample that is quick, few of them in all."""
    padded_B = -(-length_B // _VECTOR) * _VECTOR
    for length in np.unique(padded_B):
        group = padded_B == length
        longest = length_B[group].max()
        if longest <= length - _VECTOR + _FEW:
            padded_B[group] = longest
    return padded_B


def _lay_out(
    length_B: np.ndarray, start_B: np.ndarray, padded_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay tokens out in padded samples, from those that are padded least on."""
    order_B = padded_B.argsort(kind="stable")
    padded_B = padded_B[order_B]
    sample_P = order_B.repeat(padded_B)
    offset_P = np.arange(len(sample_P)) - (padded_B.cumsum() - padded_B).repeat(padded_B)
    is_token_P = offset_P < length_B[sample_P]
    rows_P = np.where(is_token_P, start_B[sample_P] + offset_P, 0)
    taken = np.flatnonzero(is_token_P)
    places_N = np.empty(len(taken), dtype=np.int64)
    places_N[rows_P[taken]] = taken
    return rows_P, is_token_P, places_N
