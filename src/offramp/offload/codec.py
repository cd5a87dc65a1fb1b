"""Codecs write features for a link: as they are, at half precision, or in 8 bits a number.

Shapes: ``S`` samples that go on, ``C`` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import ArtifactError, InvalidArgumentError, PayloadError
from offramp.runtime.bundle import Step
from offramp.runtime.files import TensorSpec

Array = npt.NDArray[Any]

_LARGEST_INT8 = 127
_MAP_AXES = 4
"""Maps have channels before height and width; tokens and vectors have them last."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A way to write what crosses a link.

    Only features that are float32 change; masks, ids and what a policy remembers cross as they
    are.

    Attributes:
        name: What options call it.
        dtype: Of a float32 feature on the link.
        compresses: Whether the link compresses the payload with zstd, without loss.
    """

    name: str
    dtype: str
    compresses: bool = False


CODECS = {
    codec.name: codec
    for codec in (
        Codec(name="float32", dtype="float32"),
        Codec(name="float16", dtype="float16"),
        Codec(name="int8", dtype="int8"),
        Codec(name="int8+zstd", dtype="int8", compresses=True),
    )
}
"""By name, from exact to small."""
_DTYPES = tuple(dict.fromkeys(codec.dtype for codec in CODECS.values()))


def find_codec(name: str) -> Codec:
    """Look a codec up."""
    if name not in CODECS:
        raise InvalidArgumentError(
            f"The 'codec' parameter must be one of {', '.join(CODECS)}. Got {name!r}."
        )
    return CODECS[name]


def encode(carried: Sequence[Array], step: Step, codec: Codec) -> list[Array]:
    """Write what a step is given in the types of a codec."""
    scales = _scales(step) if codec.dtype == "int8" else None
    encoded = []
    for index, tensor in enumerate(carried):
        if not _changes(step, index):
            encoded.append(tensor)
        elif scales is not None:
            steps = np.rint(tensor / along_channels(scales[index], tensor.ndim))
            encoded.append(steps.clip(-_LARGEST_INT8, _LARGEST_INT8).astype(np.int8))
        else:
            largest = np.finfo(codec.dtype).max
            encoded.append(tensor.clip(-largest, largest).astype(codec.dtype, copy=False))
    return encoded


def decode(carried: Sequence[Array], step: Step) -> list[Array]:
    """Read what came over a link; its types say which codec wrote it."""
    specs = (*step.features, *step.state)
    if len(carried) != len(specs):
        raise PayloadError(f"Expected {len(specs)} tensors. Got {len(carried)}.")
    decoded = []
    for index, (tensor, spec) in enumerate(zip(carried, specs, strict=True)):
        allowed = _DTYPES if _changes(step, index) else (spec.dtype,)
        if tensor.dtype.name not in allowed:
            raise PayloadError(
                f"Expected {spec.name} as {', '.join(allowed)}. Got {tensor.dtype.name}."
            )
        if tensor.dtype.name == "int8" and _changes(step, index):
            tensor = tensor * _fitting_scales(tensor, spec, step, index)
        decoded.append(tensor.astype(spec.dtype, copy=False))
    return decoded


def channel_scales(features: Array) -> tuple[float, ...]:
    """Find the number that a step of 8 bits stands for in each channel.

    Example:
        >>> channel_scales(np.array([[127.0, 0.0], [-254.0, 0.0]]))
        (2.0, 1.0)
    """
    axis = 1 if features.ndim == _MAP_AXES else features.ndim - 1
    others = tuple(i for i in range(features.ndim) if i != axis)
    largest_C = np.abs(features).max(axis=others)
    return tuple(float(x) / _LARGEST_INT8 if x > 0 else 1.0 for x in largest_C)


def along_channels(scale_C: Array, ndim: int) -> Array:
    """Lay one number per channel so that it multiplies a tensor of features."""
    return scale_C[:, None, None] if ndim == _MAP_AXES else scale_C


def _fitting_scales(tensor: Array, spec: TensorSpec, step: Step, index: int) -> Array:
    """Checked first: a tensor of one channel would be blown up to all of them."""
    axes = tensor.shape[1:]
    expected = spec.sample_shape
    if len(axes) != len(expected) or any(
        size is not None and size != axis for axis, size in zip(axes, expected, strict=True)
    ):
        raise PayloadError(f"Expected {spec.name} of shape (B, *{expected}). Got {tensor.shape}.")
    if step.channel_scales is None:
        raise PayloadError("Expected float32 or float16: this bundle has no scales for int8.")
    return along_channels(_scales(step)[index], tensor.ndim)


def check_scales(step: Step) -> None:
    """Make sure that features before a step can be written in int8."""
    counts = [len(scale_C) for scale_C in _scales(step)]
    channels = [
        0
        if not _changes(step, index)
        else spec.sample_shape[0 if len(spec.sample_shape) == 3 else -1]
        for index, spec in enumerate(step.features)
    ]
    if counts != channels:
        raise ArtifactError(
            f"The bundle has int8 scales for {counts} channels before {step.file}. Expected "
            f"{channels}: export the run again."
        )


def _changes(step: Step, index: int) -> bool:
    """Tell if codecs write a tensor that crosses in types of their own."""
    return index < len(step.features) and step.features[index].dtype == "float32"


def _scales(step: Step) -> list[Array]:
    """Of each feature."""
    if step.channel_scales is None:
        raise ArtifactError(
            f"The bundle does not say how large the features before {step.file} get, which int8 "
            "needs. Export the run again, or choose the codec float16."
        )
    return [np.array(scale_C, dtype=np.float32) for scale_C in step.channel_scales]
