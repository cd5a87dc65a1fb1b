"""ONNX files of a bundle, and the tensors that go into them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

Dtype = Annotated[str, Meta(pattern=r"^(bool|u?int(8|16|32|64)|float(16|32|64))$")]
Size = Annotated[int, Meta(ge=0, le=2**31)]

_TENSOR, _DATA_LOCATION = "tensor", 14
_INSIDE = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: _TENSOR, 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {},
}
"""Numbers of the fields of onnx.proto through which tensors are reached."""


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
    dtype: Dtype
    sample_shape: tuple[Size | None, ...]

    @property
    def has_tokens(self) -> bool:
        """True if its first axis after the batch is as long as the longest sample."""
        return None in self.sample_shape

    def fits(self, sample_shape: Sequence[int], multiple: int = 1) -> bool:
        """Tell if a tensor has this shape, the batch axis left out; free axes some multiple."""
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


def file_sha256(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def has_weights_outside(content: bytes) -> bool:
    """Tell whether a tensor of an ONNX file lies in another file, which no hash covers.

    The file is walked as protobuf reads it; the onnx package is no part of the base install.
    """
    waiting = [("model", 0, len(content))]
    try:
        while waiting:
            message, at, end = waiting.pop()
            while at < end:
                tag, at = _varint(content, at)
                number, wire = (tag & 0xFFFFFFFF) >> 3, tag & 7
                if wire == 0:
                    value, at = _varint(content, at)
                    if message == _TENSOR and number == _DATA_LOCATION and value & 0xFFFFFFFF:
                        return True
                elif wire == 2:
                    size, at = _varint(content, at)
                    if number in _INSIDE[message]:
                        waiting.append((_INSIDE[message][number], at, at + size))
                    at += size
                elif wire in (1, 5):
                    at += 8 if wire == 1 else 4
                elif wire > 5:
                    return False
    except IndexError:  # it ends in the middle of a number
        pass
    return False


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, least first, and where it ends."""
    value = shift = 0
    while content[at] & 0x80:
        value |= (content[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | content[at] << shift, at + 1
