"""Tokens of several samples in one row, of which each attends to its own sample only.

Everything but attention works on each token alone, so that samples of unequal length need no
padding. How attention keeps them apart was measured: ``benchmarks/halting_attention.py``.

Shapes: ``N`` tokens of all samples, ``B`` samples, ``T`` tokens of the longest, ``A`` width of all
heads together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from offramp.routing.layers import attend

PADDED_LENGTHS = (32, 64)
"""Where the longest sample is no longer than the first, one call for all costs less than one for
each sample; no longer than the second, where padding makes no more than ``PADDED_TIMES`` as many
tokens of them."""
PADDED_TIMES = 1.5


class Packing:
    """Where each sample's tokens lie: one sample after the other.

    Args:
        lengths: Tokens of each sample, each at least 1.
        device: Where the tokens are.
    Attributes:
        lengths_B: Tokens of each sample, shape (B,), int64.
        starts_B: Number of each sample's first token, shape (B,), int64.
        sample_N: Number of each token's sample, shape (N,), int64.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._lengths = list(lengths)
        self._longest = max(self._lengths)
        self._is_even = min(self._lengths) == self._longest
        is_full = len(self._lengths) * self._longest <= PADDED_TIMES * sum(self._lengths)
        is_short = self._longest <= PADDED_LENGTHS[is_full]
        self._pads = is_short or device.type != "cpu"
        self.lengths_B = torch.tensor(self._lengths, device=device)
        self.starts_B = self.lengths_B.cumsum(0) - self.lengths_B
        rows_B = torch.arange(len(self._lengths), device=device)
        self.sample_N = rows_B.repeat_interleave(self.lengths_B, output_size=sum(self._lengths))
        if self._pads and not self._is_even:
            self._lay_out()

    def attend(self, query_NA: Tensor, key_NA: Tensor, value_NA: Tensor, num_heads: int) -> Tensor:
        """Attention of each token to those of its own sample.

        Args:
            query_NA: Shape (N, A).
            key_NA: Shape (N, A).
            value_NA: Shape (N, A).
            num_heads: Heads that A is divided into.
        Returns:
            Shape (N, A).
        """
        qkv = query_NA, key_NA, value_NA
        shape = (len(self._lengths), self._longest, query_NA.shape[1])
        if self._is_even:
            query, key, value = (tensor.reshape(shape) for tensor in qkv)
            return attend(query, key, value, num_heads).flatten(0, 1)
        if self._pads:
            padded = (tensor.index_select(0, self._rows).view(shape) for tensor in qkv)
            query, key, value = padded
            context = attend(query, key, value, num_heads, is_key_BT=self._is_token_BT)
            return context.flatten(0, 1).index_select(0, self._places_N)
        return self._attend_one_by_one(*qkv, num_heads)

    def _attend_one_by_one(
        self, query_NA: Tensor, key_NA: Tensor, value_NA: Tensor, num_heads: int
    ) -> Tensor:
        by_sample = [
            torch.split(tensor.view(1, len(tensor), num_heads, -1), self._lengths, 1)
            for tensor in (query_NA, key_NA, value_NA)
        ]
        contexts = [
            F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
            for qkv in zip(*by_sample, strict=True)
        ]
        return torch.cat(contexts, 1)[0].flatten(1)

    def _lay_out(self) -> None:
        """Number of the token at each place of a padded batch, and the way back.

        Padding repeats the first token.
        """
        places_T = torch.arange(self._longest, device=self.lengths_B.device)
        self._is_token_BT = places_T < self.lengths_B[:, None]
        rows_BT = torch.where(self._is_token_BT, self.starts_B[:, None] + places_T, 0)
        self._rows = rows_BT.flatten()
        self._places_N = self._is_token_BT.flatten().nonzero()[:, 0]
