"""Reading data sets from Parquet files in the Hugging Face image convention.

A column ``image`` (struct of bytes and path) with a column ``label`` (int64) or ``mask`` (as
``image``), or a column ``text`` with a column ``label``; class names in the schema's metadata.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from offramp.errors import DataError, reason
from offramp.measure.dense import IGNORED_LABEL
from offramp.training.data import ImageStore

MAX_DECODED_BYTES = 4 * 2**30
"""A split that decodes to at most this many bytes is held in memory; a larger one streams."""

MAX_IMAGE_PIXELS = 64 * 2**20
"""Images with more pixels are refused before they are decoded."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a data set.

    Attributes:
        store: The pixels, indexed by rows.
        labels_N: Class of each image, shape (N,), int64; of each pixel, shape (N, H, W), uint8,
            where the data set has masks.
        class_names: Name of each class.
    """

    store: ImageStore
    labels_N: Tensor
    class_names: tuple[str, ...]

    def fingerprint(self) -> str:
        """Identify the data: the same images and labels in the same order give the same value."""
        digest = hashlib.sha256(self.labels_N.numpy().tobytes())
        for rows in torch.split(torch.arange(len(self.labels_N)), 4096):
            digest.update(self.store[rows].numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class TextSplit:
    """One split of a data set of texts.

    Attributes:
        texts: As they are.
        labels_N: Class of each, shape (N,), int64.
        class_names: Name of each class.
    """

    texts: tuple[str, ...]
    labels_N: Tensor
    class_names: tuple[str, ...]

    def fingerprint(self) -> str:
        """Identify the data: the same texts and labels in the same order give the same value."""
        digest = hashlib.sha256(self.labels_N.numpy().tobytes())
        digest.update(json.dumps(self.texts).encode())
        return digest.hexdigest()


def read_parquet(path: Path, *, image_shape: tuple[int, int, int]) -> Split:
    """Read a Parquet file of labelled images.

    Args:
        path: The file.
        image_shape: Channels (1 or 3), height and width that every image must have.
    Returns:
        The split; decoded if at most :data:`MAX_DECODED_BYTES`, else decoded on access.
    Raises:
        DataError: If the file is damaged, has other columns, or an image has another size.
    """
    table = _read_table(path, image="bytes", label="int")
    encoded = table["image"].combine_chunks().field("bytes")
    labels_N = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
    class_names = _class_names(table.schema.metadata, labels_N)
    _check_labels(labels_N, len(class_names), path)
    streamed = EncodedImages(encoded, image_shape=image_shape, path=path)
    if len(labels_N) * int(np.prod(image_shape)) > MAX_DECODED_BYTES:
        return Split(store=streamed, labels_N=labels_N, class_names=class_names)
    decoded = torch.empty((len(labels_N), *image_shape), dtype=torch.uint8)
    chunks = torch.split(torch.arange(len(labels_N)), 1024)
    shown = f"decoding {path.name}"
    for rows in track(chunks, shown, transient=True, disable=not sys.stdout.isatty()):
        decoded[rows[0] : rows[-1] + 1] = streamed[rows]
    return Split(store=decoded, labels_N=labels_N, class_names=class_names)


def read_text_parquet(path: Path, *, class_names: tuple[str, ...]) -> TextSplit:
    """Read a Parquet file of labelled texts.

    Args:
        path: The file.
        class_names: Name of each class.
    Returns:
        The split.
    Raises:
        DataError: If the file is damaged or has other columns or labels.
    """
    table = _read_table(path, text="string", label="int")
    labels_N = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
    _check_labels(labels_N, len(class_names), path)
    return TextSplit(
        texts=tuple(table["text"].to_pylist()), labels_N=labels_N, class_names=class_names
    )


def read_mask_parquet(
    path: Path,
    *,
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    ignored_label: int,
) -> Split:
    """Read a Parquet file of images with masks, and decode it.

    Args:
        path: The file, with the columns ``image`` and ``mask``.
        image_shape: Channels (1 or 3), height and width that every image must have.
        class_names: Name of each class.
        ignored_label: What stands in a mask where no class is known.
    Returns:
        The split, with ``IGNORED_LABEL`` where no class is known.
    Raises:
        DataError: If the file is damaged, has other columns, an image or a mask of another size,
            or a mask with a class that has no name.
    """
    table = _read_table(path, image="bytes", mask="bytes")
    rows = torch.arange(len(table))
    images, masks = (
        EncodedImages(table[name].combine_chunks().field("bytes"), image_shape=shape, path=path)
        for name, shape in (("image", image_shape), ("mask", (1, *image_shape[1:])))
    )
    labels_NHW = masks[rows][:, 0]
    labels_NHW[labels_NHW == ignored_label] = IGNORED_LABEL
    _check_labels(known_labels(labels_NHW), len(class_names), path)
    return Split(store=images[rows], labels_N=labels_NHW, class_names=class_names)


def known_labels(labels: Tensor) -> Tensor:
    """Labels that say something.

    Args:
        labels: Classes of samples or of pixels, any shape.
    Returns:
        Those that are not ``IGNORED_LABEL``, shape (M,).
    """
    return labels[labels != IGNORED_LABEL]


def _read_table(path: Path, **kinds: str) -> Any:
    """Read columns, and make sure that they are of the kinds they should be."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_of = {"string": pa.types.is_string, "int": pa.types.is_integer}
    try:
        table = pq.read_table(path, columns=list(kinds))
        for column, kind in kinds.items():
            values = table[column]
            if kind == "bytes":
                values.combine_chunks().field("bytes")
            elif not is_of[kind](values.type) or values.null_count:
                raise ValueError(f"{column} is {values.type}, or some are missing")
    except (pa.ArrowException, AttributeError, OSError, KeyError, ValueError) as error:
        expected = " and ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise DataError(
            f"Expected a Parquet file with the columns {expected} in {path}. It is damaged or "
            f"holds something else: {reason(error)}"
        ) from error
    return table


def _check_labels(labels_N: Tensor, num_classes: int, path: Path) -> None:
    if len(labels_N) == 0 or int(labels_N.min()) < 0 or int(labels_N.max()) >= num_classes:
        raise DataError(
            f"Expected labels in [0, {num_classes - 1}] in {path}, one per class name. "
            + (f"Got {labels_N.min()} to {labels_N.max()}." if len(labels_N) else "Got no rows.")
        )


class EncodedImages:
    """Images that stay compressed in memory and are decoded when asked for.

    Args:
        encoded: An Arrow array of compressed images.
        image_shape: Channels (1 or 3), height and width that every image must have.
        path: Where they come from, for messages.
    """

    def __init__(self, encoded: Any, *, image_shape: tuple[int, int, int], path: Path) -> None:
        self._encoded = encoded
        self._image_shape = image_shape
        self._path = path

    def __getitem__(self, rows_B: Tensor) -> Tensor:
        """Decode some rows.

        Args:
            rows_B: Row numbers, shape (B,), int64.
        Returns:
            Pixels, shape (B, C, H, W), uint8.
        Raises:
            DataError: If a row is no image or has another size.
        """
        images = np.empty((len(rows_B), *self._image_shape), dtype=np.uint8)
        for position, row in enumerate(rows_B.tolist()):
            images[position] = self._decode(row)
        return torch.from_numpy(images)

    def _decode(self, row: int) -> np.ndarray[Any, Any]:
        channels, height, width = self._image_shape
        try:
            with Image.open(io.BytesIO(self._encoded[row].as_py())) as image:
                if image.size != (width, height):
                    raise DataError(
                        f"Expected images of {width}x{height} pixels in {self._path}. "
                        f"Row {row} has {image.size[0]}x{image.size[1]}."
                    )
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except (OSError, TypeError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"Row {row} of {self._path} holds no readable image.") from error
        return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _class_names(metadata: dict[bytes, bytes] | None, labels_N: Tensor) -> tuple[str, ...]:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        largest = int(labels_N.max()) if len(labels_N) else -1
        return tuple(str(label) for label in range(largest + 1))
