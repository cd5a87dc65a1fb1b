"""Where data sets come from: a folder of Parquet files, scikit-learn, or torchvision's download.

A folder holds ``<split>.parquet`` in the Hugging Face image convention: a column ``image``
(struct of bytes and path), a column ``label`` (int64), class names in the schema's metadata.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from offramp.errors import (
    DataError,
    DataNotFoundError,
    InvalidArgumentError,
    MissingExtraError,
    reason,
)
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
        labels_N: Class of each image, shape (N,), int64.
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


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A data set that recipes can name.

    Attributes:
        splits: Names of its splits.
        image_shape: Channels, height, width; None for texts.
        class_names: Where the files do not say them.
        transposed: Whether height and width are swapped against an upright image.
        light_on_dark: Whether strokes are light on a dark ground.
        ink_margin: Blank border around the strokes, as a share of the side.
        download: What ``--data`` takes to download it; None where it needs no download.
    """

    splits: tuple[str, ...]
    image_shape: tuple[int, int, int] | None
    class_names: tuple[str, ...] = ()
    transposed: bool = False
    light_on_dark: bool = False
    ink_margin: float = 0.0
    download: str | None = None


EMNIST_BALANCED = "emnist-balanced"
"""Given as ``--data``: download the official EMNIST Balanced split through torchvision."""

SOURCES = {
    "digits": DataSource(splits=("train", "test"), image_shape=(1, 8, 8), light_on_dark=True),
    "emnist47": DataSource(
        splits=("train", "test"),
        image_shape=(1, 28, 28),
        transposed=True,
        light_on_dark=True,
        ink_margin=2 / 28,
        download=EMNIST_BALANCED,
    ),
    "cifar10": DataSource(splits=("train", "test"), image_shape=(3, 32, 32)),
    "sst2_sentences": DataSource(
        splits=("train", "validation", "test"),
        image_shape=None,
        class_names=("negative", "positive"),
    ),
    "trec6": DataSource(
        splits=("train", "test"),
        image_shape=None,
        class_names=("description", "entity", "abbreviation", "human", "location", "number"),
    ),
}


def load_split(name: str, split: str, data: str | None = None) -> Split | TextSplit:
    """Load one split of a data set.

    Args:
        name: A key of :data:`SOURCES`.
        split: One of its splits.
        data: A folder with ``<split>.parquet``, or the word that downloads it; if None,
            ``$OFFRAMP_DATA/<name>`` is tried.
    Returns:
        The split, decoded in memory where it fits.
    Raises:
        InvalidArgumentError: If there is no such data set, or it has no such split.
        DataNotFoundError: If it is in none of these places; the message names them.
        DataError: If a file is damaged or does not hold what it should.
    """
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
    return read_parquet(path, image_shape=source.image_shape)


def _find_parquet(name: str, split: str, data: str | None) -> Path:
    root = os.environ.get("OFFRAMP_DATA")
    folder = Path(data) if data is not None else Path(root) / name if root else None
    if folder is not None and (folder / f"{split}.parquet").is_file():
        return folder / f"{split}.parquet"
    looked = (
        f"{folder / f'{split}.parquet'} does not exist" if folder else "OFFRAMP_DATA is not set"
    )
    download = SOURCES[name].download
    ways = [f"--data DIR with {split}.parquet in it", f"OFFRAMP_DATA=DIR with {name}/ in it"]
    if download is not None:
        ways.append(f"--data {download} to download the official set through torchvision")
    raise DataNotFoundError(
        f"Data set {name}, split {split}, not found: {looked}. Give {'; or '.join(ways)}."
    )


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
    table = _read_table(path, "image", "bytes")
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
    table = _read_table(path, "text", "string")
    labels_N = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
    _check_labels(labels_N, len(class_names), path)
    return TextSplit(
        texts=tuple(table["text"].to_pylist()), labels_N=labels_N, class_names=class_names
    )


def _read_table(path: Path, column: str, kind: str) -> Any:
    """Read samples and labels, and make sure that they are what they should be."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=[column, "label"])
        if kind == "bytes":
            table[column].combine_chunks().field("bytes")
        elif not pa.types.is_string(table[column].type) or table[column].null_count:
            raise ValueError(f"texts are {table[column].type}, some missing")
        if not pa.types.is_integer(table["label"].type) or table["label"].null_count:
            raise ValueError(f"labels are {table['label'].type}")
    except (pa.ArrowException, AttributeError, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"Expected a Parquet file with the columns {column} ({kind}) and label (int) in "
            f"{path}. It is damaged or holds something else: {reason(error)}"
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
            f"--data {EMNIST_BALANCED} downloads through torchvision, which does not import here: "
            "pip install torchvision (a build that matches torch)"
        ) from error
    root = Path.home() / ".cache" / "offramp"
    try:
        emnist = EMNIST(str(root), split="balanced", train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise DataNotFoundError(
            f"EMNIST Balanced could not be downloaded to {root}: {reason(error)}. "
            "Connect to the internet, or give --data DIR with Parquet files in it."
        ) from error
    return Split(
        store=emnist.data[:, None],
        labels_N=emnist.targets.to(torch.int64),
        class_names=tuple(emnist.classes),
    )


def nearest(word: str, known: list[str]) -> str:
    """Name the known word that is most like a mistyped one.

    Args:
        word: What was typed.
        known: What would have been valid, at least one.
    Returns:
        The most similar.
    """
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
