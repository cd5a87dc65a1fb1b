"""Samples of a split as users have it, in batches that a network takes.

Shapes: ``N`` samples, ``B`` batch.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.data.arrays import ArrayBatches, PictureArrays, PixelStore, TextArrays
from offramp.data.folders import (
    SplitFiles,
    draw_evenly,
    find_split,
    folder_labels,
    number_classes,
    one_column,
)
from offramp.data.parquet import MOST_TEXT_BYTES, decoded, read_own_table
from offramp.data.preprocessing import Pixels, make_tokenizer, read_pixels
from offramp.decoding import parse_json
from offramp.errors import DataError
from offramp.runtime.preprocessing import AnyPreprocessing, Preprocessing, TextPreprocessing

TEXT_COLUMNS = ("text", "sentence", "content", "document", "review")
PICTURE_COLUMNS = ("image", "img", "picture", "pixels")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
"""Names of columns, by what they hold."""


@dataclass(frozen=True, kw_only=True)
class OwnSplit:
    """Samples of a split.

    Attributes:
        name: Of the split.
        batches: The samples, as the network takes them.
        fingerprint: Identifies all samples of the split, of which ``batches`` may be a subset.
        num_samples: As many as the split has.
        shares: Of each class in the split.
    """

    name: str
    batches: ArrayBatches
    fingerprint: str
    num_samples: int
    shares: tuple[float, ...]


def load_own(
    data: Path | str,
    split: str | None,
    preprocessing: AnyPreprocessing,
    *,
    class_names: Sequence[str] = (),
    num_classes: int | None = None,
    num_inputs: int = 1,
    length: int | None = None,
    subset: int | None = None,
    preferred: Sequence[str] = (),
) -> OwnSplit:
    """Load a split for a network of one's own.

    Args:
        data: A file or a folder, as ``folders.py`` finds splits in it.
        split: Which; None for the only one, or the first of ``preferred`` that there is.
        preprocessing: How samples become inputs.
        class_names: Of the network, in its order.
        num_classes: Of the network.
        num_inputs: Of a network of texts: ids, and mask, and token types.
        length: Tokens of every text, where the network takes no others.
        subset: Samples to draw, evenly by class; None for all.
        preferred: Splits to look for where none is named.
    """
    files = find_split(Path(data), split, preferred=preferred)
    is_text = isinstance(preprocessing, TextPreprocessing)
    read = _read_pictures if files.classes is not None else _read_table
    samples = read(files, is_text)
    labels_N = number_classes(
        samples.labels,
        names=class_names,
        num_classes=num_classes,
        own_names=samples.class_names,
        where=samples.where,
    )
    rows = range(len(labels_N)) if subset is None else draw_evenly(labels_N, subset)
    fingerprint = hashlib.sha256(labels_N.tobytes())
    for one in range(len(labels_N)):
        fingerprint.update(hashlib.sha256(samples.content(one)).digest())
    chosen = labels_N[list(rows)]
    batches: ArrayBatches
    if isinstance(preprocessing, TextPreprocessing):
        texts = [samples.content(row).decode() for row in rows]
        coded = make_tokenizer(preprocessing).encode_batch(texts)
        batches = TextArrays(
            [one.ids for one in coded],
            chosen,
            pad_id=preprocessing.pad_id,
            num_inputs=num_inputs,
            length=length,
        )
    else:
        encoded = PictureStore(samples, rows, preprocessing)
        store: PixelStore = decoded(encoded, len(rows), preprocessing.shape, samples.where)
        batches = PictureArrays(store, chosen, preprocessing)
    return OwnSplit(
        name=files.name,
        batches=batches,
        fingerprint=fingerprint.hexdigest(),
        num_samples=len(labels_N),
        shares=tuple((np.bincount(labels_N, minlength=num_classes or 0) / len(labels_N)).tolist()),
    )


def class_names_in(data: Path | str, split: str, *, is_text: bool) -> tuple[str, ...]:
    """Find the names of classes that a split has; numbers are in their order."""
    files = find_split(Path(data), split)
    samples = (_read_pictures if files.classes is not None else _read_table)(files, is_text)
    if samples.class_names:
        return samples.class_names
    if isinstance(samples.labels, np.ndarray):
        return tuple(map(str, range(int(samples.labels.max(initial=-1)) + 1)))
    names = set(samples.labels)
    by_number = all(name.isdecimal() and name.isascii() for name in names)
    return tuple(sorted(names, key=int if by_number else None))


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples as they are: the bytes of each, and its label as the data has it."""

    where: Path
    content: Callable[[int], bytes]
    labels: Sequence[str] | npt.NDArray[np.int64]
    class_names: tuple[str, ...] = ()
    files: Sequence[Path] = ()


class PictureStore:
    """Pictures that stay compressed, and are decoded and brought to size when asked for."""

    def __init__(self, samples: Samples, rows: Sequence[int], preprocessing: Preprocessing) -> None:
        self._samples = samples
        self._rows = rows
        self._preprocessing = preprocessing

    def __getitem__(self, rows_B: npt.NDArray[Any]) -> Pixels:
        """Decode some pictures."""
        return np.stack([self._decode(self._rows[row]) for row in rows_B.tolist()])

    def _decode(self, row: int) -> Pixels:
        if self._samples.files:
            return read_pixels(self._samples.files[row], self._preprocessing)
        try:
            return read_pixels(self._samples.content(row), self._preprocessing)
        except DataError as error:
            raise DataError(f"Sample {row} of {self._samples.where}: {error}") from error


def _read_pictures(files: SplitFiles, is_text: bool) -> Samples:
    assert files.classes is not None
    paths = [path for of_class in files.classes.values() for path in of_class]
    where = paths[0].parent.parent
    if is_text:
        raise DataError(f"Expected texts for the network. Found pictures in {where}.")
    return Samples(
        where=where,
        content=lambda row: paths[row].read_bytes(),
        labels=folder_labels(files.classes),
        files=paths,
    )


def _read_table(files: SplitFiles, is_text: bool) -> Samples:
    where = files.tables[0] if len(files.tables) == 1 else files.tables[0].parent
    wanted = TEXT_COLUMNS if is_text else PICTURE_COLUMNS
    if files.tables[0].suffix.lower() == ".parquet":
        table = read_own_table(files.tables, wanted, LABEL_COLUMNS, is_text=is_text)
        return Samples(
            where=where, content=table.content, labels=table.labels, class_names=table.class_names
        )
    if not is_text:
        raise DataError(
            f"Expected pictures for the network. {where} holds texts: give Parquet, or pictures "
            "as <class>/*.png."
        )
    rows = [row for path in files.tables for row in _rows_of(path)]
    if not rows:
        raise DataError(f"Expected labelled samples in {where}. Got none.")
    text = one_column(list(rows[0]), wanted, "texts", where)
    label = one_column(list(rows[0]), LABEL_COLUMNS, "labels", where)
    texts = [_field(row, text, number, where).encode() for number, row in enumerate(rows)]
    return Samples(
        where=where,
        content=texts.__getitem__,
        labels=[_field(row, label, number, where) for number, row in enumerate(rows)],
    )


def _rows_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of CSV or JSON lines by the names of their columns."""
    suffix = path.suffix.lower()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix in (".csv", ".tsv"):
                csv.field_size_limit(MOST_TEXT_BYTES)
                yield from csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
                return
            for number, line in enumerate(file, start=1):
                if len(line) > 2 * MOST_TEXT_BYTES:
                    raise ValueError(f"line {number} takes more than {2 * MOST_TEXT_BYTES} bytes")
                if line.strip():
                    row = parse_json(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"line {number} is no object")
                    yield row
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"Expected {'JSON objects, one a line,' if 'json' in suffix else 'rows of CSV'} in "
            f"{path}, in UTF-8. It is damaged or holds something else: {error}."
        ) from error


def _field(row: Mapping[str, Any], name: str, number: int, where: Path) -> str:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(
            f"Expected {name} in row {number} of {where}. Got {json.dumps(value)[:40]}."
        )
    return str(value).strip()
