"""Texts as token ids, padded to the longest.

Shapes: ``B`` batch, ``T`` tokens of the longest text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD_ID = 0
"""Stands where a shorter text has no token."""


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
