"""Batches of arrays: samples of one's own reach a bundle without torch, and a network with it.

Shapes: ``N`` samples, ``B`` batch, ``C`` channels, ``H W`` pixels, ``T`` tokens of the longest.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from offramp.data.preprocessing import Pixels, normalised, pad_ids
from offramp.measure.arrays import as_array
from offramp.runtime.preprocessing import Preprocessing

Array = npt.NDArray[Any]
Batch = tuple[tuple[Array, ...], Array]
"""Inputs and labels."""


class ArrayBatches(ABC):
    """Labelled samples, fetched a batch at a time, as ``Batches`` are.

    Attributes:
        labels_N: Class of each sample, shape (N,), or of its pixels, (N, H, W), int64.
        run_batch_size: Samples to run at a time: so many fit in memory.
    """

    labels_N: npt.NDArray[np.int64]
    run_batch_size = 256

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        inputs, labels = self.__getitems__([index])
        one = tuple(each[0] for each in inputs) if isinstance(inputs, tuple) else inputs[0]
        return one, labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Any, Array]:
        """Fetch a batch: an input, or several as a tuple, and labels."""
        index_B = np.asarray(indices, dtype=np.int64)
        inputs = self._inputs(index_B)
        return inputs if len(inputs) > 1 else inputs[0], self.labels_N[index_B]

    def in_order(self) -> Iterator[Batch]:
        """Go through all samples."""
        for start in range(0, len(self), self.run_batch_size):
            index_B = np.arange(start, min(len(self), start + self.run_batch_size))
            yield self._inputs(index_B), self.labels_N[index_B]

    @abstractmethod
    def _inputs(self, index_B: Array) -> tuple[Array, ...]: ...

    @abstractmethod
    def hashes(self) -> npt.NDArray[np.uint64]:
        """Tell the samples apart by what a network sees of them, shape (N,)."""


class PixelStore(Protocol):
    """Whatever holds the pixels: an array, or files that are decoded when asked for."""

    def __getitem__(self, rows_B: Array) -> Pixels:
        """Pixels of the given rows, shape (B, C, H, W)."""
        ...


class PictureArrays(ArrayBatches):
    """Labelled pictures."""

    def __init__(
        self,
        store: PixelStore,
        labels_N: npt.NDArray[np.int64],
        preprocessing: Preprocessing,
    ) -> None:
        self.store = store
        self.labels_N = labels_N
        self._preprocessing = preprocessing

    def _inputs(self, index_B: Array) -> tuple[Array, ...]:
        return (normalised(self.store[index_B], self._preprocessing),)

    def hashes(self) -> npt.NDArray[np.uint64]:
        """Hash the pixels, as they are before they are normalised."""
        starts = range(0, len(self), self.run_batch_size)
        batches = (np.arange(len(self))[start : start + self.run_batch_size] for start in starts)
        return hashed(one.tobytes() for index_B in batches for one in self.store[index_B])


class TextArrays(ArrayBatches):
    """Labelled texts as token ids; with them mask and token types, if a network takes these."""

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        labels_N: npt.NDArray[np.int64],
        *,
        pad_id: int,
        num_inputs: int = 1,
        length: int | None = None,
    ) -> None:
        self._ids = ids
        self.labels_N = labels_N
        self._pad_id = pad_id
        self._num_inputs = num_inputs
        self._length = length

    def _inputs(self, index_B: Array) -> tuple[Array, ...]:
        texts = [self._ids[row] for row in index_B.tolist()]
        ids_BT = pad_ids(texts, self._pad_id, length=self._length)
        mask_BT = pad_ids([[1] * len(text) for text in texts], 0, length=ids_BT.shape[1])
        return (ids_BT, mask_BT, np.zeros_like(ids_BT))[: self._num_inputs]

    def hashes(self) -> npt.NDArray[np.uint64]:
        """Hash the token ids, without padding."""
        return hashed(np.array(text, dtype=np.int64).tobytes() for text in self._ids)


def hashed(samples: Iterator[bytes]) -> npt.NDArray[np.uint64]:
    """Hash samples to 64 bits each."""
    digests = [hashlib.blake2b(sample, digest_size=8).digest() for sample in samples]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def in_arrays(data: object, *, batch_size: int = 256) -> Iterator[Batch]:
    """Go through labelled data of any kind; all but our own arrays take torch."""
    if isinstance(data, ArrayBatches):
        yield from data.in_order()
        return
    from offramp.data.batches import batches_of, read_batch

    for batch in batches_of(data, batch_size=batch_size):
        inputs, labels_B = read_batch(batch)
        yield tuple(map(as_array, inputs)), as_array(labels_B)
