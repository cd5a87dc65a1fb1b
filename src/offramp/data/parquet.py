"""Reading data sets from Parquet files in the Hugging Face image convention.

A column ``image`` (struct of bytes and path) with a column ``label`` (int64) or ``mask`` (as
``image``), or a column ``text`` with a column ``label``; class names in the schema's metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.progress import track

from offramp.data.folders import one_column
from offramp.data.pictures import (
    Pixels,
    light_on_dark,
    quiet_pillow,
    read_mask_file,
    read_picture_file,
)
from offramp.errors import DataError, reason
from offramp.measure.dense import IGNORED_LABEL

if TYPE_CHECKING:  # samples of one's own are read without torch
    from torch import Tensor

    from offramp.data.images import ImageStore

MAX_DECODED_BYTES = 4 * 2**30
"""A split that decodes to at most this many bytes is held in memory; a larger one streams."""

_MOST_ROWS = 2**26
"""A column that repeats one value takes next to nothing in a file, however many rows it has."""

MOST_TEXT_BYTES = 2**20
"""A text of more bytes is refused."""

_MOST_BYTES_A_PIXEL = 16
_MOST_BYTES_BESIDE_PIXELS = 4 * 2**20
"""Bytes that a compressed image may take for colour profiles and notes."""

_MOST_FILE_BYTES = 64 * 2**20
"""A compressed picture of any size is refused if it takes more."""
_MOST_NAME_BYTES = 4096
"""The name of a class."""

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
        import torch

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
    labels_N = _tensor(table["label"].to_numpy().astype(np.int64))
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
    table = _read_table(path, {"text": _Column("string", MOST_TEXT_BYTES), "label": _LABELS})
    labels_N = _tensor(table["label"].to_numpy().astype(np.int64))
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
    labels_NHW = masks[_tensor(np.arange(len(table)))][:, 0]
    labels_NHW[labels_NHW == ignored_label] = IGNORED_LABEL
    _check_labels(known_labels(labels_NHW), len(class_names), path)
    store = _in_tensors(decoded(images, len(table), image_shape, path))
    return Split(store=store, labels_N=labels_NHW, class_names=class_names)


@dataclass(frozen=True, kw_only=True)
class OwnTable:
    """Samples and labels of Parquet files as users have them.

    Attributes:
        content: From a row to the bytes of its picture or text.
        labels: Numbers, shape (N,), int64; or names.
        class_names: Of the numbers; empty where the files do not say them.
    """

    content: Callable[[int], bytes]
    labels: npt.NDArray[np.int64] | list[str]
    class_names: tuple[str, ...]


def read_own_table(
    paths: Sequence[Path],
    value_names: Sequence[str],
    label_names: Sequence[str],
    *,
    is_text: bool,
) -> OwnTable:
    """Read Parquet files, shards of a split, whose columns are found by their names."""
    import pyarrow as pa

    read = [_read_own(path, value_names, label_names, is_text=is_text) for path in paths]
    tables = [table for table, _ in read]
    if any(other != read[0][1] or tables[0].schema != table.schema for table, other in read):
        raise DataError(
            f"Expected shards of the same columns and classes in {paths[0].parent}. Found others."
        )
    whole = pa.concat_tables(tables)
    if len(whole) == 0:
        raise DataError(f"Expected labelled samples in {paths[0]}. Got no rows.")
    values, labels = _Values(whole["value"]), whole["label"]
    return OwnTable(
        content=lambda row: values[row].encode() if is_text else values[row],
        labels=labels.to_numpy().astype(np.int64)
        if pa.types.is_integer(labels.type)
        else labels.to_pylist(),
        class_names=read[0][1],
    )


def _read_own(
    path: Path, value_names: Sequence[str], label_names: Sequence[str], *, is_text: bool
) -> tuple[Any, tuple[str, ...]]:
    """Read a column of samples, ``value``, and one of labels, ``label``; and names of classes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"Expected a Parquet file in {path}. It is none: {reason(error)}"
        ) from error
    what = "texts" if is_text else "pictures"
    name = one_column(schema.names, value_names, what, path)
    label = one_column(schema.names, label_names, "labels", path)
    kind = _Column("string", MOST_TEXT_BYTES) if is_text else _Column("binary", _MOST_FILE_BYTES)
    value = f"{name}.bytes" if pa.types.is_struct(schema.field(name).type) else name
    numbered = pa.types.is_integer(schema.field(label).type)
    named = _LABELS if numbered else _Column("string", _MOST_NAME_BYTES)
    table = _read_table(path, {value: kind, label: named})
    return (
        pa.table({"value": table[value], "label": table[label]}),
        _names_of(schema.metadata, label) or (),
    )


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


def decoded(streamed: Any, count: int, image_shape: tuple[int, int, int], path: Path) -> Any:
    """All images decoded in an array, if they fit in memory."""
    if count * math.prod(image_shape) > MAX_DECODED_BYTES:
        return streamed
    decoded = np.empty((count, *image_shape), dtype=np.uint8)
    starts, shown = range(0, count, 1024), f"decoding {path.name}"
    for start in track(starts, shown, transient=True, disable=not sys.stdout.isatty()):
        rows = np.arange(start, min(count, start + 1024))
        decoded[rows] = streamed[rows]
    return decoded


def _in_tensors(store: Any) -> ImageStore:
    """Pixels as a tensor, unless they are decoded when asked for."""
    tensors: ImageStore = _tensor(store) if isinstance(store, np.ndarray) else store
    return tensors


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    import torch

    return torch.from_numpy(array)


class _Values:
    """A column of bytes or texts that came as dictionaries, row by row."""

    def __init__(self, column: Any) -> None:
        import pyarrow as pa

        dictionaries = [chunk.dictionary for chunk in column.chunks]
        starts = accumulate(map(len, dictionaries), initial=0)
        self._known = pa.chunked_array(dictionaries)
        self._number_N = np.concatenate(
            [
                np.where(chunk.is_valid(), chunk.indices.fill_null(0).to_numpy() + start, _MISSING)
                for chunk, start in zip(column.chunks, starts, strict=False)
            ]
        )

    def __getitem__(self, row: int) -> Any:
        number = self._number_N[row]
        if number == _MISSING:
            raise DataError("its bytes are missing")
        return self._known[int(number)].as_py()


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
        self._content = _Values(encoded)
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
        return _tensor(light_on_dark(images) if self._is_light_on_dark else images)

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


def _names_of(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """Names of classes, as Hugging Face's features say them; None where they do not."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None


def _class_names(
    metadata: dict[bytes, bytes] | None, labels_N: Tensor, path: Path
) -> tuple[str, ...]:
    named = _names_of(metadata, "label")
    if named is not None:
        return named
    largest = int(labels_N.max()) if len(labels_N) else -1
    if largest >= _MOST_UNNAMED_CLASSES:
        raise DataError(
            f"Expected labels below {_MOST_UNNAMED_CLASSES} in {path}, which names no classes. "
            f"Got {largest}."
        )
    return tuple(str(label) for label in range(largest + 1))
