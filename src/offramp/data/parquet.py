"""Reading data sets from Parquet files in the Hugging Face image convention.

A column ``image`` (struct of bytes and path) with a column ``label`` (int64) or ``mask`` (as
``image``), or a column ``text`` with a column ``label``; class names in the schema's metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from offramp.data.images import ImageStore
from offramp.data.pictures import (
    Pixels,
    light_on_dark,
    quiet_pillow,
    read_mask_file,
    read_picture_file,
)
from offramp.errors import DataError, reason
from offramp.measure.dense import IGNORED_LABEL

MAX_DECODED_BYTES = 4 * 2**30
"""A split that decodes to at most this many bytes is held in memory; a larger one streams."""

_MOST_ROWS = 2**26
"""A column that repeats one value takes next to nothing in a file, however many rows it has."""

_MOST_TEXT_BYTES = 2**20
"""A text of more bytes is refused."""

_MOST_BYTES_A_PIXEL = 16
_MOST_BYTES_BESIDE_PIXELS = 4 * 2**20
"""Bytes that a compressed image may take for colour profiles and notes."""

_MOST_UNNAMED_CLASSES = 2**20
_MISSING = -1


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
    columns = {"image.bytes": _of_images(image_shape), "label": _LABELS}
    table = _read_table(path, columns)
    labels_N = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
    class_names = _class_names(table.schema.metadata, labels_N, path)
    _check_labels(labels_N, len(class_names), path)
    streamed = EncodedImages(
        table["image.bytes"],
        image_shape=image_shape,
        path=path,
        is_light_on_dark=is_light_on_dark,
    )
    store = _decoded(streamed, len(labels_N), image_shape, path)
    return Split(store=store, labels_N=labels_N, class_names=class_names)


def read_text_parquet(path: Path, *, class_names: tuple[str, ...]) -> TextSplit:
    """Read a Parquet file of labelled texts."""
    table = _read_table(path, {"text": _Column("string", _MOST_TEXT_BYTES), "label": _LABELS})
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
    table = _read_table(path, columns)
    if len(table) * math.prod(mask_shape) > MAX_DECODED_BYTES:
        raise DataError(
            f"Expected masks of at most {MAX_DECODED_BYTES} pixels together, which are held in "
            f"memory. {path} has {len(table)} of {image_shape[2]}x{image_shape[1]}: split it."
        )
    images, masks = (
        EncodedImages(table[name], image_shape=shape, path=path, is_mask=name.startswith("mask"))
        for name, shape in (("image.bytes", image_shape), ("mask.bytes", mask_shape))
    )
    labels_NHW = masks[torch.arange(len(table))][:, 0]
    labels_NHW[labels_NHW == ignored_label] = IGNORED_LABEL
    _check_labels(known_labels(labels_NHW), len(class_names), path)
    store = _decoded(images, len(table), image_shape, path)
    return Split(store=store, labels_N=labels_NHW, class_names=class_names)


def known_labels(labels: Tensor) -> Tensor:
    """Labels that say something."""
    return labels[labels != IGNORED_LABEL]


class _Column(NamedTuple):
    """Type of a column as pyarrow names it, and the most bytes that a value may take."""

    kind: str
    most_bytes: int


_LABELS = _Column("integer", 8)


def _of_images(shape: tuple[int, int, int]) -> _Column:
    pixels = shape[1] * shape[2]
    return _Column("binary", pixels * _MOST_BYTES_A_PIXEL + _MOST_BYTES_BESIDE_PIXELS)


def _read_table(path: Path, columns: Mapping[str, _Column]) -> Any:
    """Read columns by their paths, and make sure that they hold what they should.

    Bytes and texts come as Arrow dictionaries: a value that is there a million times over is in
    memory once, as it is in the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
        _check_sizes(metadata, columns)
        repeated = [name for name, column in columns.items() if column.kind != "integer"]
        with pq.ParquetFile(path, read_dictionary=repeated, metadata=metadata) as file:
            # Group by group: pyarrow cannot join the dictionaries of several within a struct.
            groups = [
                file.read_row_group(index, columns=list(columns)).flatten()
                for index in range(metadata.num_row_groups)
            ]
            table = pa.concat_tables(groups or [file.read(columns=list(columns)).flatten()])
        for name, column in columns.items():
            _check_values(name, column, table[name])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        expected = " and ".join(f"{name} ({column.kind})" for name, column in columns.items())
        raise DataError(
            f"Expected a Parquet file with the columns {expected} in {path}. It is damaged or "
            f"holds something else: {reason(error)}"
        ) from error
    return table


def _check_sizes(metadata: Any, columns: Mapping[str, _Column]) -> None:
    """Refuse what the file says of itself before it is read."""
    names = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    missing = sorted(set(columns) - set(names))
    if missing:
        raise ValueError(f"there is no {missing[0]}")
    if metadata.num_rows > _MOST_ROWS:
        raise ValueError(f"it has {metadata.num_rows} rows, more than {_MOST_ROWS}")
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for name, column in columns.items():
            size = group.column(names.index(name)).total_uncompressed_size
            if size > group.num_rows * column.most_bytes + _MOST_BYTES_BESIDE_PIXELS:
                raise ValueError(f"{group.num_rows} rows of {name} take {size} bytes")


def _check_values(name: str, column: _Column, values: Any) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    is_dictionary = pa.types.is_dictionary(values.type)
    kind = values.type.value_type if is_dictionary else values.type
    if not getattr(pa.types, f"is_{column.kind}")(kind):
        raise ValueError(f"{name} is {kind}")
    if values.null_count and column.kind != "binary":  # a missing image is named by its row
        raise ValueError(f"{name} is missing in {values.null_count} rows")
    for chunk in values.chunks if is_dictionary else ():
        longest = pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0
        if longest > column.most_bytes:
            raise ValueError(f"one of {name} takes {longest} bytes, more than {column.most_bytes}")


def _check_labels(labels_N: Tensor, num_classes: int, path: Path) -> None:
    if len(labels_N) == 0 or int(labels_N.min()) < 0 or int(labels_N.max()) >= num_classes:
        allowed = f"in [0, {num_classes - 1}]" if num_classes > 0 else "of at least 0"
        raise DataError(
            f"Expected labels {allowed} in {path}, one per class name. "
            + (f"Got {labels_N.min()} to {labels_N.max()}." if len(labels_N) else "Got no rows.")
        )


def _decoded(
    streamed: EncodedImages, count: int, image_shape: tuple[int, int, int], path: Path
) -> ImageStore:
    """All images decoded, if they fit in memory."""
    if count * math.prod(image_shape) > MAX_DECODED_BYTES:
        return streamed
    decoded = torch.empty((count, *image_shape), dtype=torch.uint8)
    chunks = torch.split(torch.arange(count), 1024)
    shown = f"decoding {path.name}"
    for rows in track(chunks, shown, transient=True, disable=not sys.stdout.isatty()):
        decoded[rows[0] : rows[-1] + 1] = streamed[rows]
    return decoded


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
        import pyarrow as pa

        dictionaries = [chunk.dictionary for chunk in encoded.chunks]
        starts = accumulate(map(len, dictionaries), initial=0)
        self._files = pa.chunked_array(dictionaries)
        self._file_N = np.concatenate(
            [
                np.where(chunk.is_valid(), chunk.indices.fill_null(0).to_numpy() + start, _MISSING)
                for chunk, start in zip(encoded.chunks, starts, strict=False)
            ]
        )
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
        number = self._file_N[row]
        try:
            if number == _MISSING:
                raise DataError("its bytes are missing")
            content = self._files[int(number)].as_py()
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
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        largest = int(labels_N.max()) if len(labels_N) else -1
    if largest >= _MOST_UNNAMED_CLASSES:
        raise DataError(
            f"Expected labels below {_MOST_UNNAMED_CLASSES} in {path}, which names no classes. "
            f"Got {largest}."
        )
    return tuple(str(label) for label in range(largest + 1))
