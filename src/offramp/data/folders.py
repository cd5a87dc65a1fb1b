"""Data as users have it: the splits and files below a path, and which class each sample has.

A path is a file (Parquet, CSV, JSON lines) or a folder: of such files, each named after its split
and perhaps in shards, or of pictures in a folder for each class, below a folder for each split or
not. What could mean two things is refused with the names that were found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from offramp.errors import DataError, DataNotFoundError, InvalidArgumentError

_SHARD = re.compile(r"(?P<split>.+?)(-(?P<number>\d{5})-of-(?P<count>\d{5}))?")
_TABLES = (".parquet", ".csv", ".tsv", ".jsonl")
_LINES = (".json", *_TABLES)
"""Endings of files that a path may name; in a folder, JSON is mostly something else."""
_PICTURES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
_MOST_FILES = 2**24
_MOST_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """The files of one split.

    Attributes:
        name: Of the split.
        tables: Parquet, CSV or JSON lines, shards in order; empty for pictures in folders.
        classes: From the name of a class to its pictures; None for tables.
    """

    name: str
    tables: tuple[Path, ...] = ()
    classes: Mapping[str, tuple[Path, ...]] | None = None


def find_split(path: Path, split: str | None, *, preferred: Sequence[str] = ()) -> SplitFiles:
    """Find the files of a split below a path.

    Without a name it is the only split, or the first of the preferred ones that there is.
    """
    found = splits_below(path)
    if split is not None and split not in found:
        what = f"no split {split}" if found.keys() - {path.name} else "no splits"
        raise DataNotFoundError(
            f"The data {path} has {what}. It has {_listed(list(found))}: name one of them with "
            "split, or leave it out."
        )
    if split is None and len(found) == 1:
        split = next(iter(found))
    split = split or next((name for name in preferred if name in found), None)
    if split is None:
        raise InvalidArgumentError(
            f"The data {path} has the splits {_listed(list(found))}. Say which: split=NAME."
        )
    return found[split]


def splits_below(path: Path) -> dict[str, SplitFiles]:
    """Find the splits that there are, by name."""
    if path.is_file():
        if path.suffix.lower() not in _LINES:
            raise DataError(f"Expected a file {_any_of(_LINES)}, or a folder. Got {path}.")
        shard = _SHARD.fullmatch(path.stem)
        name = shard["split"] if shard else path.stem
        return {name: SplitFiles(name=name, tables=(path,))}
    if not path.is_dir():
        raise DataNotFoundError(f"Expected data at {path}. There is no such file or folder.")
    tables = _tables_in(path) or _tables_in(path / "data")
    pictures = _pictures_below(path)
    if tables and pictures:
        raise DataError(
            f"Expected tables or pictures in {path}. Found both: the tables {_listed(list(tables))}"
            f" and the folders {_listed(list(pictures))}. Name the one that you mean."
        )
    if not tables and not pictures:
        raise DataNotFoundError(
            f"Expected data in {path}: files <split>{_any_of(_TABLES)}, or pictures as "
            "<split>/<class>/*.png or <class>/*.png. Found none."
        )
    return tables or pictures


def _tables_in(folder: Path) -> dict[str, SplitFiles]:
    by_split: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        shard = _SHARD.fullmatch(file.stem)
        if file.suffix.lower() in _TABLES and shard and not file.name.startswith("."):
            by_split.setdefault(shard["split"], []).append(file)
    for split, files in by_split.items():
        _check_shards(split, files)
    return {name: SplitFiles(name=name, tables=tuple(files)) for name, files in by_split.items()}


def _check_shards(split: str, files: Sequence[Path]) -> None:
    """Refuse several files for one split, unless they are all of its shards."""
    shards = [_SHARD.fullmatch(file.stem) for file in files]
    counts = {shard["count"] for shard in shards if shard}
    numbers = [int(shard["number"]) for shard in shards if shard and shard["number"]]
    if len({file.suffix for file in files}) > 1 or len(counts) > 1:
        names = _listed([file.name for file in files])
        raise DataError(f"Expected one file for the split {split}, or its shards. Found {names}.")
    (count,) = counts
    if count is not None and numbers != list(range(int(count))):
        raise DataError(
            f"Expected {int(count)} shards of the split {split} in {files[0].parent}. "
            f"Found {len(numbers)}: fetch them all."
        )


def _pictures_below(folder: Path) -> dict[str, SplitFiles]:
    """Pictures in a folder for each class, by split; the folder's own name where none is named."""
    inner = {below.name: below for below in _folders_in(folder)}
    classes = {name: _pictures_in(below) for name, below in inner.items()}
    classes = {name: files for name, files in classes.items() if files}
    splits = {}
    for name, below in inner.items():
        of_split = {one.name: _pictures_in(one) for one in _folders_in(below)}
        of_split = {one: files for one, files in of_split.items() if files}
        if of_split:
            splits[name] = SplitFiles(name=name, classes=of_split)
    if classes and splits:
        raise DataError(
            f"Expected folders of classes in {folder}, or of splits. Found pictures in "
            f"{_listed(list(classes))}, and folders of pictures in {_listed(list(splits))}."
        )
    if classes:
        name = folder.resolve().name
        return {name: SplitFiles(name=name, classes=classes)}
    return splits


def _folders_in(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_dir() and one.name[0] not in "._")


def _pictures_in(folder: Path) -> tuple[Path, ...]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _PICTURES)
    if len(files) > _MOST_FILES:
        raise DataError(f"Expected at most {_MOST_FILES} pictures in {folder}. Got {len(files)}.")
    return tuple(file for file in files if not file.name.startswith("."))


def number_classes(
    labels: Sequence[str] | npt.NDArray[np.int64],
    *,
    names: Sequence[str],
    num_classes: int | None,
    own_names: Sequence[str] = (),
    where: Path,
) -> npt.NDArray[np.int64]:
    """Say which of the network's classes each label is.

    Args:
        labels: Names, or numbers.
        names: Of the network's classes, in its order; empty where it has none.
        num_classes: Of the network; None where that is not known.
        own_names: What the data calls its numbers.
        where: Of the data, to name it.
    """
    if isinstance(labels, np.ndarray):
        numbers = labels.astype(np.int64)
        if names and own_names and not (len(numbers) and numbers.min() < 0):
            if len(numbers) and numbers.max() >= len(own_names):
                raise DataError(
                    f"Expected labels below {len(own_names)} in {where}, which names so many "
                    f"classes. Got {numbers.max()}."
                )
            own = [own_names[number] for number in np.unique(numbers).tolist()]
            number_of = _by_name(own, names, where)
            return np.array([number_of.get(name, -1) for name in own_names])[numbers]
    else:
        named = sorted(set(labels))
        if names and not _are_numbers_only(named, names):
            number_of = _by_name(named, names, where)
        elif all(map(_is_number, named)):
            number_of = {name: int(name) for name in named}
            if not names and isinstance(labels, _Folders) and sorted(named, key=int) != named:
                raise DataError(
                    f"The folders of {where} are numbers, which mean one order by number and "
                    "another by name, and the network does not name its classes. Give the names: "
                    "export(..., class_names=(...))."
                )
        elif num_classes is None or len(named) == num_classes:
            number_of = {name: number for number, name in enumerate(named)}
        else:
            raise DataError(
                f"Expected {num_classes} classes in {where}, as the network has, which does not "
                f"name them. Found {len(named)}: {_listed(named)}. Give the names in the "
                "network's order: export(..., class_names=(...))."
            )
        numbers = np.array([number_of[label] for label in labels], dtype=np.int64)
    _check_numbers(numbers, len(names) or num_classes, where)
    return numbers


class _Folders(list[str]):
    """Names of classes that are names of folders."""


def folder_labels(classes: Mapping[str, Sequence[Path]]) -> Sequence[str]:
    """The class of each picture, folder by folder."""
    return _Folders(name for name, files in classes.items() for _ in files)


def _is_number(name: str) -> bool:
    return name.isdecimal() and name.isascii()


def _are_numbers_only(named: Sequence[str], names: Sequence[str]) -> bool:
    return all(map(_is_number, named)) and not set(named) <= set(names)


def _by_name(found: Sequence[str], names: Sequence[str], where: Path) -> dict[str, int]:
    unknown = [name for name in found if name not in names]
    if unknown:
        raise DataError(
            f"Expected the classes {_listed(list(names))} in {where}, which the network knows. "
            f"Found {_listed(unknown)}."
        )
    return {name: number for number, name in enumerate(names)}


def _check_numbers(numbers: npt.NDArray[np.int64], count: int | None, where: Path) -> None:
    if len(numbers) == 0:
        raise DataError(f"Expected labelled samples in {where}. Got none.")
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or (count is not None and high >= count):
        allowed = "of at least 0" if count is None else f"in [0, {count - 1}]"
        hint = ": samples without a label? Take another split." if low == -1 else "."
        raise DataError(
            f"Expected labels {allowed} in {where}, one per class of the network. "
            f"Got {low if low < 0 else high}{hint}"
        )


def one_column(columns: Sequence[str], wanted: Sequence[str], what: str, where: Path) -> str:
    """Find the column that holds something, by its name; refuse none and several."""
    found = [name for name in columns if name.strip().lower() in wanted]
    if len(found) != 1:
        raise DataError(
            f"Expected one column of {what} in {where}, named {' or '.join(wanted)}. Found "
            f"{' and '.join(found) or 'none'} among {', '.join(columns[:20])}."
        )
    return found[0]


def draw_evenly(labels_N: npt.NDArray[np.int64], count: int, *, seed: int = 0) -> list[int]:
    """Positions of so many samples, as many of each class while it has any, in order."""
    if count < 1:
        raise InvalidArgumentError(
            f"The 'subset' parameter must be an int of at least 1. Got {count}."
        )
    if count > len(labels_N):
        raise InvalidArgumentError(
            f"The 'subset' parameter must be at most the {len(labels_N):,} samples that there are. "
            f"Got {count}."
        )
    order_N = np.random.default_rng(seed).permutation(len(labels_N))
    # The first of every class, then the second of every class, and so on.
    rank_N = np.empty(len(labels_N), dtype=np.int64)
    for label in np.unique(labels_N):
        members = order_N[labels_N[order_N] == label]
        rank_N[members] = np.arange(len(members))
    place_N = np.empty(len(labels_N), dtype=np.int64)
    place_N[order_N] = np.arange(len(labels_N))
    chosen = np.lexsort((place_N, rank_N))[:count]
    return sorted(chosen.tolist())


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_SHOWN])
    more = len(names) - _MOST_SHOWN
    return shown if more <= 0 else f"{shown} and {more} more"


def _any_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
