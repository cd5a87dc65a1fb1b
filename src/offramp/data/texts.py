"""Batches of texts: token ids padded to the longest of the batch.

Shapes: ``B`` batch, ``N`` samples, ``T`` tokens of the longest sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from offramp.data.arrays import hashed
from offramp.data.images import Batches

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD_ID = 0
"""Stands where a shorter text has no token."""


class TextBatches(Batches):
    """Labelled texts as token ids; with them mask and token types, if a network takes these."""

    def __init__(
        self,
        tokens: Sequence[Tensor],
        labels_N: Tensor,
        *,
        rows_N: Tensor | None = None,
        pad_id: int = PAD_ID,
        num_inputs: int = 1,
        length: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.labels_N = labels_N
        self.rows_N = torch.arange(len(labels_N)) if rows_N is None else rows_N
        self.pad_id = pad_id
        self.num_inputs = num_inputs
        self.length = length

    def __getitems__(self, indices: Sequence[int]) -> tuple[Any, Tensor]:
        """Fetch a batch."""
        index_B = torch.as_tensor(indices)
        texts = [self.tokens[row] for row in self.rows_N[index_B].tolist()]
        ids_BT = pad_sequence(texts, batch_first=True, padding_value=self.pad_id)
        if self.length is not None:
            missing = self.length - ids_BT.shape[1]
            ids_BT = F.pad(ids_BT, (0, missing), value=self.pad_id)
        if self.num_inputs == 1:
            return ids_BT, self.labels_N[index_B]
        lengths_B = torch.tensor([len(text) for text in texts])
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
        inputs = (ids_BT, mask_BT, torch.zeros_like(ids_BT))
        return inputs[: self.num_inputs], self.labels_N[index_B]

    def subset(self, index_B: Tensor) -> TextBatches:
        """The same texts, fewer of them."""
        return TextBatches(
            self.tokens,
            self.labels_N[index_B],
            rows_N=self.rows_N[index_B],
            pad_id=self.pad_id,
            num_inputs=self.num_inputs,
            length=self.length,
        )

    def hashes(self) -> npt.NDArray[np.uint64]:
        """Hash the token ids, without padding."""
        return hashed(self.tokens[row].numpy().tobytes() for row in self.rows_N.tolist())

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
