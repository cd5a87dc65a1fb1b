"""Sources of data sets: a folder of Parquet files, scikit-learn, or torchvision's download.

A folder holds ``<split>.parquet`` in the Hugging Face image convention: a column ``image``
(struct of bytes and path), a column ``label`` (int64), class names in the schema's metadata.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import numpy as np
import torch

from offramp.data.known_sources import EMNIST_BALANCED, SOURCES, DataSource
from offramp.data.splits import (
    Split,
    TextSplit,
    read_mask_parquet,
    read_parquet,
    read_text_parquet,
)
from offramp.errors import DataNotFoundError, InvalidArgumentError, MissingExtraError, reason

__all__ = ["EMNIST_BALANCED", "SOURCES", "DataSource", "load_split", "nearest"]


def load_split(name: str, split: str, data: str | None = None) -> Split | TextSplit:
    """Load one split of a data set."""
    if name not in SOURCES:
        raise InvalidArgumentError(
            f"There is no data set {name!r}. Did you mean {nearest(name, list(SOURCES))!r}?"
        )
    source = SOURCES[name]
    if split not in source.splits:
        raise InvalidArgumentError(
            f"The data set {name} has the splits {', '.join(source.splits)}. Got {split!r}."
        )
    if name == "digits" and data is None:
        return _sklearn_digits(split)
    if data is not None and data == source.download:
        return _torchvision_emnist(split)
    path = _find_parquet(name, split, data)
    if source.image_shape is None:
        return read_text_parquet(path, class_names=source.class_names)
    if source.ignored_label is not None:
        return read_mask_parquet(
            path,
            image_shape=source.image_shape,
            class_names=source.class_names,
            ignored_label=source.ignored_label,
        )
    return read_parquet(path, image_shape=source.image_shape, is_light_on_dark=source.light_on_dark)


def _find_parquet(name: str, split: str, data: str | None) -> Path:
    root = os.environ.get("OFFRAMP_DATA")
    folder = Path(data) if data is not None else Path(root) / name if root else None
    if folder is not None and (folder / f"{split}.parquet").is_file():
        return folder / f"{split}.parquet"
    looked = (
        f"{folder / f'{split}.parquet'} does not exist" if folder else "OFFRAMP_DATA is not set"
    )
    download = SOURCES[name].download
    ways = [f"data=DIR with {split}.parquet in it", f"OFFRAMP_DATA=DIR with {name}/ in it"]
    if download is not None:
        ways.append(f"data={download} to download the official set through torchvision")
    raise DataNotFoundError(
        f"Data set {name}, split {split}, not found: {looked}. Give {'; or '.join(ways)}."
    )


def _sklearn_digits(split: str) -> Split:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtraError(
            "The digits data set comes with scikit-learn: pip install 'offramp[train]'"
        ) from error
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)[:, None]
    rows = np.arange(len(pixels))
    train, test = train_test_split(rows, test_size=0.25, random_state=0, stratify=digits.target)
    chosen = train if split == "train" else test
    return Split(
        store=torch.from_numpy(pixels[chosen]),
        labels_N=torch.from_numpy(digits.target[chosen].astype(np.int64)),
        class_names=tuple(str(name) for name in digits.target_names),
    )


def _torchvision_emnist(split: str) -> Split:
    try:
        from torchvision.datasets import EMNIST
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(
            f"data={EMNIST_BALANCED} downloads through torchvision, which does not import here: "
            "pip install torchvision (a build that matches torch)"
        ) from error
    root = Path.home() / ".cache" / "offramp"
    try:
        emnist = EMNIST(str(root), split="balanced", train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise DataNotFoundError(
            f"EMNIST Balanced could not be downloaded to {root}: {reason(error)}. "
            "Connect to the internet, or give data=DIR with Parquet files in it."
        ) from error
    return Split(
        store=emnist.data[:, None],
        labels_N=emnist.targets.to(torch.int64),
        class_names=tuple(emnist.classes),
    )


def nearest(word: str, known: list[str]) -> str:
    """Name the known word that is most like a mistyped one."""
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
