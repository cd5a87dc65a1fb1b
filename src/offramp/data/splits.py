"""Splits of data sets, read into tensors from Parquet in the Hugging Face image convention.

A column ``image`` (struct of bytes and path) with a column ``label`` (int64) or ``mask`` (as
``image``), or a column ``text`` with a column ``label``; class names in the schema's metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.data import parquet
from offramp.data.images import ImageStore
from offramp.data.parquet import (
    LABELS,
    MOST_BYTES_BESIDE_PIXELS,
    MOST_TEXT_BYTES,
    Column,
    Values,
    decoded,
    names_of,
    read_table,
)
from offramp.data.pictures import (
    Pixels,
    light_on_dark,
    quiet_pillow,
    read_mask_file,
    read_picture_file,
)
from offramp.errors import DataError
from offramp.measure.outputs import IGNORED_LABEL

_MOST_BYTES_A_PIXEL = 16
_MOST_UNNAMED_CLASSES = 2**20


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


def read_parquet(
    path: Path, *, image_shape: tuple[int, int, int], is_light_on_dark: bool = False
) -> Split:
    """Read a Parquet file of labelled images."""
    columns = {"image.bytes": _of_images(image_shape), "label": LABELS}
    table = read_table(path, columns)
    labels_N = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
    class_names = _class_names(table.schema.metadata, labels_N, path)
    _check_labels(labels_N, len(class_names), path)
    streamed = EncodedImages(
        table["image.bytes"],
        image_shape=image_shape,
        path=path,
        is_light_on_dark=is_light_on_dark,
    )
    store = _in_tensors(decoded(streamed, len(labels_N), image_shape, path))
    return Split(store=store, labels_N=labels_N, class_names=class_names)


def read_text_parquet(path: Path, *, class_names: tuple[str, ...]) -> TextSplit:
    """Read a Parquet file of labelled texts."""
    table = read_table(path, {"text": Column("string", MOST_TEXT_BYTES), "label": LABELS})
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
    """Read a Parquet file of images with masks, and decode it."""
    mask_shape = (1, *image_shape[1:])
    columns = {"image.bytes": _of_images(image_shape), "mask.bytes": _of_images(mask_shape)}
    table = read_table(path, columns)
    if len(table) * math.prod(mask_shape) > parquet.MAX_DECODED_BYTES:
        raise DataError(
            f"Expected masks of at most {parquet.MAX_DECODED_BYTES} pixels together, which are "
            f"held in memory. {path} has {len(table)} of {image_shape[2]}x{image_shape[1]}: split "
            "it."
        )
    images, masks = (
        EncodedImages(table[name], image_shape=shape, path=path, is_mask=name.startswith("mask"))
        for name, shape in (("image.bytes", image_shape), ("mask.bytes", mask_shape))
    )
    labels_NHW = masks[torch.from_numpy(np.arange(len(table)))][:, 0]
    labels_NHW[labels_NHW == ignored_label] = IGNORED_LABEL
    _check_labels(known_labels(labels_NHW), len(class_names), path)
    store = _in_tensors(decoded(images, len(table), image_shape, path))
    return Split(store=store, labels_N=labels_NHW, class_names=class_names)


def known_labels(labels: Tensor) -> Tensor:
    """Labels that say something."""
    return labels[labels != IGNORED_LABEL]


def _of_images(shape: tuple[int, int, int]) -> Column:
    pixels = shape[1] * shape[2]
    return Column("binary", pixels * _MOST_BYTES_A_PIXEL + MOST_BYTES_BESIDE_PIXELS)


def _check_labels(labels_N: Tensor, num_classes: int, path: Path) -> None:
    if len(labels_N) == 0 or int(labels_N.min()) < 0 or int(labels_N.max()) >= num_classes:
        allowed = f"in [0, {num_classes - 1}]" if num_classes > 0 else "of at least 0"
        raise DataError(
            f"Expected labels {allowed} in {path}, one per class name. "
            + (f"Got {labels_N.min()} to {labels_N.max()}." if len(labels_N) else "Got no rows.")
        )


def _in_tensors(store: Any) -> ImageStore:
    """Pixels as a tensor, unless they are decoded when asked for."""
    tensors: ImageStore = torch.from_numpy(store) if isinstance(store, np.ndarray) else store
    return tensors


class EncodedImages:
    """Images that stay compressed in memory and are decoded when asked for."""

    def __init__(
        self,
        encoded: Any,
        *,
        image_shape: tuple[int, int, int],
        path: Path,
        is_mask: bool = False,
        is_light_on_dark: bool = False,
    ) -> None:
        self._content = Values(encoded)
        self._image_shape = image_shape
        self._path = path
        self._is_mask = is_mask
        self._is_light_on_dark = is_light_on_dark

    def __getitem__(self, rows_B: Tensor) -> Tensor:
        """Decode some rows."""
        images = np.empty((len(rows_B), *self._image_shape), dtype=np.uint8)
        with quiet_pillow():
            for position, row in enumerate(rows_B.tolist()):
                images[position] = self._decode(row)
        return torch.from_numpy(light_on_dark(images) if self._is_light_on_dark else images)

    def _decode(self, row: int) -> Pixels:
        channels, height, width = self._image_shape
        try:
            content = self._content[row]
            if self._is_mask:
                return read_mask_file(content, size=(width, height))
            picture = read_picture_file(content, channels=channels, size=(width, height))
        except DataError as error:
            raise DataError(
                f"Row {row} of {self._path} holds no readable image: {error}."
            ) from error
        return np.asarray(picture).reshape(height, width, channels).transpose(2, 0, 1)


def _class_names(
    metadata: dict[bytes, bytes] | None, labels_N: Tensor, path: Path
) -> tuple[str, ...]:
    named = names_of(metadata, "label")
    if named is not None:
        return named
    largest = int(labels_N.max()) if len(labels_N) else -1
    if largest >= _MOST_UNNAMED_CLASSES:
        raise DataError(
            f"Expected labels below {_MOST_UNNAMED_CLASSES} in {path}, which names no classes. "
            f"Got {largest}."
        )
    return tuple(str(label) for label in range(largest + 1))
