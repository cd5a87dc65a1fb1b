"""Reading columns of Parquet files, checked before they fill the memory: no torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.progress import track

from offramp.data.folders import one_column
from offramp.errors import DataError, reason

MAX_DECODED_BYTES = 4 * 2**30
"""A split that decodes to at most this many bytes is held in memory; a larger one streams."""

_MOST_ROWS = 2**26
"""A column that repeats one value takes next to nothing in a file, however many rows it has."""

MOST_TEXT_BYTES = 2**20
"""A text of more bytes is refused."""

MOST_BYTES_BESIDE_PIXELS = 4 * 2**20
"""Bytes that a compressed image may take for colour profiles and notes."""

_MOST_FILE_BYTES = 64 * 2**20
"""A compressed picture of any size is refused if it takes more."""
_MOST_NAME_BYTES = 4096
"""The name of a class."""

_MISSING = -1


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
    read = [_read_own(path, value_names, label_names, is_text=is_text) for path in paths]
    tables = [table for table, _ in read]
    if any(other != read[0][1] or tables[0].schema != table.schema for table, other in read):
        raise DataError(
            f"Expected shards of the same columns and classes in {paths[0].parent}. Found others."
        )
    whole = pa.concat_tables(tables)
    if len(whole) == 0:
        raise DataError(f"Expected labelled samples in {paths[0]}. Got no rows.")
    values, labels = Values(whole["value"]), whole["label"]
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
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"Expected a Parquet file in {path}. It is none: {reason(error)}"
        ) from error
    what = "texts" if is_text else "pictures"
    name = one_column(schema.names, value_names, what, path)
    label = one_column(schema.names, label_names, "labels", path)
    kind = Column("string", MOST_TEXT_BYTES) if is_text else Column("binary", _MOST_FILE_BYTES)
    value = f"{name}.bytes" if pa.types.is_struct(schema.field(name).type) else name
    numbered = pa.types.is_integer(schema.field(label).type)
    named = LABELS if numbered else Column("string", _MOST_NAME_BYTES)
    table = read_table(path, {value: kind, label: named})
    return (
        pa.table({"value": table[value], "label": table[label]}),
        names_of(schema.metadata, label) or (),
    )


class Column(NamedTuple):
    """Type of a column as pyarrow names it, and the most bytes that a value may take."""

    kind: str
    most_bytes: int


LABELS = Column("integer", 8)


def read_table(path: Path, columns: Mapping[str, Column]) -> Any:
    """Read columns by their paths, and make sure that they hold what they should.

    Bytes and texts come as Arrow dictionaries: a value that is there a million times over is in
    memory once, as it is in the file.
    """
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


def _check_sizes(metadata: Any, columns: Mapping[str, Column]) -> None:
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
            if size > group.num_rows * column.most_bytes + MOST_BYTES_BESIDE_PIXELS:
                raise ValueError(f"{group.num_rows} rows of {name} take {size} bytes")


def _check_values(name: str, column: Column, values: Any) -> None:

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


class Values:
    """A column of bytes or texts that came as dictionaries, row by row."""

    def __init__(self, column: Any) -> None:
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


def names_of(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """Names of classes, as Hugging Face's features say them; None where they do not."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[column]["names"]))
    except (KeyError, TypeError, ValueError):
        return None
