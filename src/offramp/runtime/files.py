"""What a bundle's ONNX files are, and the tensors that go into them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor that goes into or comes out of a step.

    Attributes:
        name: Its name in the ONNX file.
        dtype: Its numpy type, for example float32.
        sample_shape: Its shape without the batch axis; None for the tokens of the longest sample,
            and for height and width of images of any size.
    """

    name: str
    dtype: str
    sample_shape: tuple[int | None, ...]

    @property
    def has_tokens(self) -> bool:
        """Whether its first axis after the batch is as long as the longest sample."""
        return None in self.sample_shape

    def fits(self, sample_shape: Sequence[int], multiple: int = 1) -> bool:
        """Whether a tensor has this shape, the batch axis left out; free axes some multiple."""
        return len(sample_shape) == len(self.sample_shape) and all(
            size == expected if expected is not None else size > 0 and size % multiple == 0
            for size, expected in zip(sample_shape, self.sample_shape, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """An ONNX file of a bundle.

    Attributes:
        name: Its name in the bundle's folder.
        sha256: Hash of its bytes.
    """

    name: str
    sha256: str


def read_spec(content: Mapping[str, Any]) -> TensorSpec:
    """Read what ``bundle.json`` says of a tensor.

    Args:
        content: A name, a type and a shape.
    Returns:
        The tensor.
    Raises:
        KeyError: If one is missing.
        TypeError: If there is more, or the shape is no list.
    """
    return TensorSpec(**{**content, "sample_shape": tuple(content["sample_shape"])})


def file_sha256(path: Path) -> str:
    """Hash a file.

    Args:
        path: The file.
    Returns:
        SHA-256 of its bytes, in hexadecimal.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()
