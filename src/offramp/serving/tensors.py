"""Tensors as the protocol writes them, to arrays and back.

Every size is worked out from the declared shape, and held against a cap and against what came,
before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import PayloadError

Array = npt.NDArray[Any]

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("bool"),
    "INT8": np.dtype("int8"),
    "INT16": np.dtype("int16"),
    "INT32": np.dtype("int32"),
    "INT64": np.dtype("int64"),
    "UINT8": np.dtype("uint8"),
    "UINT16": np.dtype("uint16"),
    "UINT32": np.dtype("uint32"),
    "UINT64": np.dtype("uint64"),
    "FP16": np.dtype("float16"),
    "FP32": np.dtype("float32"),
    "FP64": np.dtype("float64"),
}
"""The protocol's names of element types that are served; BYTES and BF16 have no numpy type."""

_NAMES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in DATATYPES.items()}
_MOST_AXES = 16
_JSON_TYPES: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}}
"""Python types that an element may have in JSON, by numpy's kind of the datatype."""


def datatype_of(dtype: npt.DTypeLike) -> str:
    """Name an element type as the protocol does."""
    name = _NAMES.get(np.dtype(dtype).newbyteorder("="))
    if name is None:
        raise PayloadError(f"Expected one of {', '.join(map(str, _NAMES))}. Got {np.dtype(dtype)}.")
    return name


def dtype_of(name: str, datatype: object) -> np.dtype[Any]:
    """Find the numpy type of a datatype."""
    dtype = DATATYPES.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        raise PayloadError(
            f"The datatype of tensor {_quoted(name)} must be one of {', '.join(DATATYPES)}. "
            f"Got {_quoted(datatype)}."
        )
    return dtype


def checked_shape(
    name: str, shape: object, dtype: np.dtype[Any], max_bytes: int
) -> tuple[int, ...]:
    """Make sure that a shape is one, and of a tensor that may be allocated."""
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else None
    if sizes is None or len(sizes) > _MOST_AXES or not all(map(_is_size, sizes)):
        raise PayloadError(
            f"The shape of tensor {_quoted(name)} must be at most {_MOST_AXES} whole numbers of at "
            f"least 0. Got {_quoted(shape)}."
        )
    # Axes of 0 hide nothing: numpy refuses an empty array whose other axes are absurd.
    if prod(max(size, 1) for size in sizes) * dtype.itemsize > max_bytes:
        raise PayloadError(
            f"Tensor {_quoted(name)} of shape {_quoted(sizes)} and type {dtype} is larger than the "
            f"{max_bytes} bytes that are allowed. Send fewer samples at once."
        )
    return tuple(sizes)


def from_bytes(
    name: str, content: bytes | memoryview, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    """Read a tensor from its bytes, little-endian and row by row."""
    expected = prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise PayloadError(
            f"Tensor {_quoted(name)} of shape {list(shape)} and type {dtype} takes {expected} "
            f"bytes. Got {len(content)}."
        )
    if dtype.kind == "b":
        bits = np.frombuffer(content, np.uint8)
        if bits.size and bits.max() > 1:
            raise PayloadError(f"Tensor {_quoted(name)} holds a BOOL that is neither 0 nor 1.")
        return bits.astype(dtype).reshape(shape)
    return np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype).reshape(shape)


def from_values(name: str, data: object, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Read a tensor from JSON: a flat list, or lists within lists as deep as the shape."""
    flat = _flattened(name, data, shape)
    if len(flat) != prod(shape):
        raise PayloadError(
            f"Tensor {_quoted(name)} of shape {list(shape)} takes {prod(shape)} elements. "
            f"Got {len(flat)}."
        )
    kinds: set[type] = set(map(type, flat))
    wrong = kinds - _JSON_TYPES[dtype.kind]
    if wrong:
        raise PayloadError(
            f"The elements of tensor {_quoted(name)} must be of type {dtype}. "
            f"Got one of type {min(kind.__name__ for kind in wrong)}."
        )
    array = _as_array(flat, dtype)
    if array is None:
        raise PayloadError(f"Tensor {_quoted(name)} holds a number that {dtype} cannot.")
    return array.reshape(shape)


def _flattened(name: str, data: object, shape: tuple[int, ...]) -> list[Any]:
    flat = data
    for size in shape[1:]:
        if not isinstance(flat, list) or not flat or not isinstance(flat[0], list):
            break
        if not all(isinstance(row, list) and len(row) == size for row in flat):
            raise PayloadError(
                f"The lists of tensor {_quoted(name)} must be nested as its shape {list(shape)} "
                "says, or flat."
            )
        flat = [element for row in flat for element in row]
    if not isinstance(flat, list):
        raise PayloadError(
            f"The data of tensor {_quoted(name)} must be a list. Got {type(data).__name__}."
        )
    return flat


def _as_array(flat: list[Any], dtype: np.dtype[Any]) -> Array | None:
    """The elements in their type; None if it cannot hold one of them."""
    if not flat or dtype.kind == "b":
        return np.array(flat, dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.array(flat, dtype) if limits.min <= min(flat) <= max(flat) <= limits.max else None
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, np.float64).astype(dtype)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return array if np.isfinite(array).all() else None


def to_values(name: str, array: Array) -> list[Any]:
    """Write a tensor as JSON may hold it."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise PayloadError(
            f"Output {_quoted(name)} holds NaN or infinity, which JSON cannot. Ask for binary data."
        )
    values: list[Any] = array.ravel().tolist()
    return values


def to_bytes(array: Array) -> bytes:
    """Write a tensor as its bytes, little-endian and row by row."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _quoted(value: object) -> str:
    """Shorten what a client sent for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
