"""Answers that travel between parts: what they hold, and whether what came can be one.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import PayloadError
from offramp.runtime.exit_steps import Part
from offramp.runtime.files import TensorSpec

Array = npt.NDArray[Any]

ANSWER_DTYPES = {
    "output": "float32",
    "exit_index": "int64",
    "confidence": "float32",
    "answered_by": "int64",
    "fell_back": "bool",
}
"""Outputs of a part by name, and their types."""


_ROUNDING = 1e-5
"""A mean of confidences of 1 may come out as a little more."""
_MOST_LINKS = 100


@dataclass(frozen=True, kw_only=True)
class PartAnswer:
    """Answers of a part of a network, and of those behind it, to a batch.

    Attributes:
        output: Raw logits, shape (B, C) or dense.
        exit_index: Exits that answered, shape (B,), int64.
        confidence: The policy's there, shape (B,).
        answered_by: How many links away each was answered, 0 for here, shape (B,), int64.
        fell_back: Whether the exit was not sure, and nobody behind it could be asked, shape (B,),
            bool.
    """

    output: Array
    exit_index: Array
    confidence: Array
    answered_by: Array
    fell_back: Array


def as_answer(part: Part) -> PartAnswer:
    """Make the answer of a part alone; nobody has fallen back yet."""
    return PartAnswer(
        output=part.output,
        exit_index=part.exit_index,
        confidence=part.confidence,
        answered_by=np.zeros(len(part.output), dtype=np.int64),
        fell_back=np.zeros(len(part.output), dtype=np.bool_),
    )


def read_answer(
    outputs: Mapping[str, Array],
    *,
    exits: Sequence[int],
    rows: int,
    logits_shape: tuple[int, ...] | None = None,
) -> tuple[PartAnswer, Array]:
    """Read what came back over a link, from a part that may be broken."""
    arrays = {}
    for name, dtype in ANSWER_DTYPES.items():
        array = outputs.get(name)
        sample_shape = logits_shape if name == "output" else ()
        if array is None or array.dtype.name != dtype or not _fits(array, rows, sample_shape):
            expected = "" if sample_shape is None else f" of shape {(rows, *sample_shape)}"
            got = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise PayloadError(
                f"Expected {name} as {dtype}{expected} for {rows} samples from the link. Got {got}."
            )
        arrays[name] = array
    confidence_B, answered_by_B = arrays["confidence"], arrays["answered_by"]
    is_sound_B = (
        np.isfinite(arrays["output"]).reshape(rows, -1).all(1)
        & np.isin(arrays["exit_index"], exits)
        & (confidence_B >= 0)
        & (confidence_B <= 1 + _ROUNDING)
        & (answered_by_B >= 0)
        & (answered_by_B < _MOST_LINKS)
    )
    arrays["confidence"] = confidence_B.clip(max=1)
    arrays["answered_by"] = answered_by_B + 1
    return PartAnswer(**arrays), is_sound_B


def _fits(array: Array, rows: int, sample_shape: tuple[int, ...] | None) -> bool:
    if sample_shape is None:
        return array.ndim > 1 and len(array) == rows
    return array.shape == (rows, *sample_shape)


def answer_specs(output_shape: tuple[int | None, ...]) -> tuple[TensorSpec, ...]:
    """Describe the outputs of a part, as a server does."""
    return tuple(
        TensorSpec(name=name, dtype=dtype, sample_shape=output_shape if name == "output" else ())
        for name, dtype in ANSWER_DTYPES.items()
    )
