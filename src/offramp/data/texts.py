"""Batches of texts: token ids padded to the longest of the batch.

Shapes: ``B`` batch, ``N`` samples, ``T`` tokens of the longest sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from offramp.data.images import Batches

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD_ID = 0
"""Stands where a shorter text has no token."""


class TextBatches(Batches):
    """Labelled texts as token ids."""

    def __init__(
        self, tokens: Sequence[Tensor], labels_N: Tensor, *, rows_N: Tensor | None = None
    ) -> None:
        self.tokens = tokens
        self.labels_N = labels_N
        self.rows_N = torch.arange(len(labels_N)) if rows_N is None else rows_N

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fetch a batch."""
        index_B = torch.as_tensor(indices)
        texts = [self.tokens[row] for row in self.rows_N[index_B].tolist()]
        return pad_sequence(texts, batch_first=True, padding_value=PAD_ID), self.labels_N[index_B]

    def subset(self, index_B: Tensor) -> TextBatches:
        """The same texts, fewer of them."""
        return TextBatches(self.tokens, self.labels_N[index_B], rows_N=self.rows_N[index_B])

    def unaugmented(self) -> TextBatches:
        """Texts are never augmented: the same."""
        return self


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tensor]:
    """Turn texts into token ids."""
    return [torch.tensor(coded.ids) for coded in tokenizer.encode_batch(list(texts))]


def encode_padded(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Turn texts into one batch of token ids.

    Args:
        tokenizer: Of the tokenizers library.
        texts: At least one.
    Returns:
        Ids, shape (B, T), int64, padded to the longest.
    """
    return pad_sequence(encode(tokenizer, texts), batch_first=True, padding_value=PAD_ID)
