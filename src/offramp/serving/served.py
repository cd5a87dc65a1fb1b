"""Served models: they check and decode requests, then answer them in batches.

Shapes: ``B`` batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from offramp.errors import InvalidArgumentError, PayloadError
from offramp.results import AdaptiveResult
from offramp.runtime.bundle import BUNDLE_FILE, Bundle
from offramp.runtime.dense import label_maps
from offramp.runtime.examples import example_inputs
from offramp.runtime.files import TensorSpec, file_sha256
from offramp.runtime.session import check_inputs

Array = npt.NDArray[Any]
Parameter = bool | int | float | str
"""Types that the protocol allows for the value of a request parameter."""

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ServedModel(Protocol):
    """A model as the server sees it.

    Attributes:
        name: What clients call it.
        version: For example "1".
        inputs: Tensors of a request, without the batch axis; None for a free axis.
        outputs: Tensors of an answer, likewise.
        metadata: What its configuration says beyond the protocol, for example the bundle's hash.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - documented above
    @property
    def version(self) -> str: ...  # noqa: D102
    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...  # noqa: D102
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...  # noqa: D102
    @property
    def metadata(self) -> Mapping[str, str]: ...  # noqa: D102

    def prepare(
        self, inputs: Mapping[str, Array], parameters: Mapping[str, Parameter]
    ) -> list[Array]:
        """Check a request and decode it; called on the server's event loop, so it must be quick.

        Args:
            inputs: Tensors by name, as the client sent them.
            parameters: Of the request.
        Returns:
            Arrays with the batch axis first, all of the same batch size of at least 1. Requests
            whose arrays agree in everything but that may share a batch.
        Raises:
            PayloadError: If names, types or values are wrong.
            ShapeError: If shapes are.
        """
        ...

    def run(self, arrays: list[Array], *, deadline_ms: float | None = None) -> Mapping[str, Array]:
        """Answer a batch; called in a worker thread.

        Args:
            arrays: As :meth:`prepare` made them, those of several requests joined.
            deadline_ms: Milliseconds, above 0, that the first of them to be over has left; None
                for no deadline. A model that cannot hurry need not look at it.
        Returns:
            Outputs by name, each with the batch axis first, rows in order.
        """
        ...


class Runner(Protocol):
    """Anything with the one method of a runner, for numpy arrays: a ``Session``, for example."""

    def run(self, *inputs: Array, deadline_ms: float | None = None) -> AdaptiveResult[Array]:
        """Answer a batch."""
        ...


class RunnerModel:
    """Serves a runner: what it answers, by which exit, how sure, and at what cost.

    Outputs are ``output`` (raw logits), ``label`` (the likeliest class: INT64 a sample, or UINT8 a
    pixel of the image's own size), ``exit_index`` (INT64), ``confidence`` (FP32), ``macs`` (INT64);
    of a split network also ``answered_by`` (INT64) and ``fell_back`` (BOOL).

    The runner answers one made-up sample when this is made: a bundle does not say how its outputs
    are shaped, and the first client then need not wait for what is loaded at a first call.

    Args:
        runner: Answers batches.
        bundle: What it runs; says what inputs must look like.
        name: What clients call it: letters, digits, dots, hyphens and underscores.
        version: Its version.
        keeps_deadlines: Whether the runner takes ``deadline_ms``, as an edge part does.
    Raises:
        InvalidArgumentError: If the name has other characters.
    """

    def __init__(
        self,
        runner: Runner,
        bundle: Bundle,
        *,
        name: str,
        version: str = "1",
        keeps_deadlines: bool = False,
    ) -> None:
        if not _MODEL_NAME.fullmatch(name):
            raise InvalidArgumentError(
                "The 'name' of a model must be letters, digits, dots, hyphens and underscores, at "
                f"most 100. Got {name!r}."
            )
        self.name, self.version = name, version
        self.inputs = bundle.inputs
        self.metadata: dict[str, str] = {
            "family": bundle.family,
            "bundle_sha256": file_sha256(bundle.folder / BUNDLE_FILE),
            "weights_sha256": bundle.weights_sha256,
            **_for_clients(bundle),
        }
        self._runner, self._bundle = runner, bundle
        self._keeps_deadlines = keeps_deadlines
        self.outputs = tuple(
            _free_axes(name, array, is_free=name in ("output", "label") and _has_free_axes(bundle))
            for name, array in self.run(example_inputs(bundle)).items()
        )

    def prepare(
        self, inputs: Mapping[str, Array], parameters: Mapping[str, Parameter]
    ) -> list[Array]:
        """Check names, types, shapes and values.

        Args:
            inputs: Tensors by name.
            parameters: Of the request; none is needed.
        Returns:
            The network's inputs, in its order.
        Raises:
            PayloadError: If a tensor is missing, unknown or of another type, or holds NaN or
                infinity.
            ShapeError: If shapes do not fit the bundle.
        """
        arrays = check_inputs(self._bundle, named_inputs(self.inputs, inputs))
        check_finite(self.inputs, arrays)
        return arrays

    def run(self, arrays: list[Array], *, deadline_ms: float | None = None) -> dict[str, Array]:
        """Answer a batch.

        Args:
            arrays: As :meth:`prepare` made them.
            deadline_ms: Passed on to a runner that keeps deadlines.
        Returns:
            Outputs by name, as the class says.
        """
        if self._keeps_deadlines:
            result = self._runner.run(*arrays, deadline_ms=deadline_ms)
        else:
            result = self._runner.run(*arrays)
        output = result.output
        if output.ndim == 4:
            label = label_maps(output, (arrays[0].shape[2], arrays[0].shape[3]))
        else:
            label = output.argmax(1).astype(np.int64)
        answers = {
            "output": output,
            "label": label,
            "exit_index": result.exit_index.astype(np.int64, copy=False),
            "confidence": result.confidence.astype(np.float32, copy=False),
            "macs": result.macs.astype(np.int64, copy=False),
        }
        if result.answered_by is not None:
            answers["answered_by"] = result.answered_by.astype(np.int64, copy=False)
        if result.fell_back is not None:
            answers["fell_back"] = result.fell_back.astype(bool, copy=False)
        return answers


def _for_clients(bundle: Bundle) -> dict[str, str]:
    """Say in JSON which class is which, and how samples become inputs, where the bundle does."""
    said: dict[str, object] = {"class_names": bundle.class_names}
    if bundle.pictures is not None:
        said["preprocessing"] = asdict(bundle.pictures)
    if bundle.texts is not None:
        said["preprocessing"] = asdict(bundle.texts)
    return {name: json.dumps(value) for name, value in said.items() if value}


def named_inputs(specs: Sequence[TensorSpec], inputs: Mapping[str, Array]) -> list[Array]:
    """Put a request's tensors in order, and make sure that they are all there and of their types.

    Args:
        specs: The tensors that are expected.
        inputs: What was sent, by name.
    Returns:
        The tensors, in the order of ``specs``.
    Raises:
        PayloadError: If one is missing, unknown or of another type.
    """
    arrays = in_order(specs, inputs)
    for spec in specs:
        if inputs[spec.name].dtype != np.dtype(spec.dtype):
            raise PayloadError(
                f"Input {spec.name!r} must be of type {spec.dtype}. Got {inputs[spec.name].dtype}."
            )
    return arrays


def in_order(specs: Sequence[TensorSpec], inputs: Mapping[str, Array]) -> list[Array]:
    """Put a request's tensors in order, and make sure that they are all there."""
    names = [spec.name for spec in specs]
    if set(names) != set(inputs):
        raise PayloadError(
            f"Expected the inputs {', '.join(names)}. Got {', '.join(sorted(inputs)) or 'none'}."
        )
    return [inputs[name] for name in names]


def check_finite(specs: Sequence[TensorSpec], arrays: Sequence[Array]) -> None:
    """Refuse NaN and infinity."""
    for spec, array in zip(specs, arrays, strict=True):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise PayloadError(
                f"Input {spec.name!r} must hold finite numbers. It has NaN or infinity in it."
            )


def _has_free_axes(bundle: Bundle) -> bool:
    return bundle.pixel_multiple is not None


def _free_axes(name: str, array: Array, *, is_free: bool) -> TensorSpec:
    """Describe an output; height and width are free where those of the input are."""
    shape: tuple[int | None, ...] = array.shape[1:]
    if is_free:
        shape = (*shape[:-2], None, None)
    return TensorSpec(name=name, dtype=str(array.dtype), sample_shape=shape)
