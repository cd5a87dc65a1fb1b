"""The result of a runner for a batch, whatever engine computed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Array = TypeVar("Array")
"""A ``torch.Tensor`` or a ``numpy.ndarray``, by the engine that ran."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveResult(Generic[Array]):
    """The answers of one batch and what each of them cost, in the order of the batch.

    Attributes:
        output: Raw logits of the exit each sample left by, shape (B, C), float.
        exit_index: The exit each sample left by, shape (B,), int64.
        confidence: The policy's confidence at that exit, in [0, 1], shape (B,), float.
        macs: Multiply-accumulates that ran for each sample, exit heads and gates counted, shape
            (B,), int64.
        blocks: Which blocks ran, shape (B, gates), bool; None where blocks are not skipped.
        tokens: Tokens that ran each layer, shape (B, layers), int64, 0 once the sample has left;
            None where tokens do not halt.
        answered_by: How many links away each sample was answered, shape (B,), int64: 0 for here, 1
            for the part behind the first link; None where the network is not split.
        fell_back: Whether an exit answered that was not sure, since the link behind it was of no
            use in time, shape (B,), bool; None where the network is not split.
    """

    output: Array
    exit_index: Array
    confidence: Array
    macs: Array
    blocks: Array | None = None
    tokens: Array | None = None
    answered_by: Array | None = None
    fell_back: Array | None = None

    @property
    def work(self) -> Array:
        """Work that each part did, shape (B, parts): blocks that ran, or tokens in each layer.

        Of a network with exits, the exit that each sample left by, shape (B, 1).
        """
        part = self.blocks if self.blocks is not None else self.tokens
        if part is not None:
            return part
        exit_index_B: Any = self.exit_index
        column: Array = exit_index_B[:, None]
        return column
