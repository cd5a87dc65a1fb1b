"""Bundles with int8 weights: smaller, and faster where reading weights takes the time.

Quantising changes answers. What it does to accuracy and to who leaves where is the caller's to
measure: :func:`offramp.evaluate` takes a session like any other runner.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import InvalidArgumentError, MissingExtraError
from offramp.exporting.bundle import new_bundle_folder
from offramp.exporting.exits import join_exits
from offramp.exporting.graph import write_single
from offramp.runtime import Bundle, Session, Step
from offramp.runtime.bundle import write_bundle
from offramp.runtime.files import file_sha256
from offramp.runtime.preprocessing import write_preprocessing

Array = npt.NDArray[Any]

_QUANTIZED_OPERATIONS = ["Conv", "Gemm", "MatMul"]
# Weights keep to 7 bits: processors without VNNI add pairs of products in 16 bits, which overflow
# with 8 (the tutorial's network then loses 0.6 points of accuracy, and 0.02 this way).
_WEIGHTS: dict[str, Any] = {"per_channel": True, "reduce_range": True}
_RANGE_SAMPLES = 256
"""Samples that ranges of activations are taken from."""


def quantize(bundle: Bundle | Path | str, folder: Path | str, samples: npt.ArrayLike) -> Bundle:
    """Write a copy of a bundle with int8 weights, a scale for each output channel.

    Steps with convolutions get fixed ranges of activations, taken from the samples; matrix
    products take the range of each batch as it comes. Heads, confidence and decision stay as they
    are otherwise; the plain network is quantised alike.
    """
    session = Session(bundle)
    bundle = session.bundle
    if bundle.family != "exits":
        raise InvalidArgumentError(
            f"int8 is for networks with exits. {bundle.folder} holds one of the family "
            f"{bundle.family}: run it in float32."
        )
    if bundle.pixel_multiple is not None:
        raise InvalidArgumentError(
            f"int8 is for networks that say one class for a sample. {bundle.folder} holds one that "
            "says a class for every pixel: run it in float32."
        )
    inputs_of_steps = _inputs_of_steps(session, np.asarray(samples)[:_RANGE_SAMPLES])
    with new_bundle_folder(Path(folder)) as making:
        steps = []
        for step, inputs in zip(bundle.steps, inputs_of_steps, strict=True):
            _quantize_file(bundle.folder / step.file, making / step.file, inputs)
            steps.append(_described(step, making))
        plain_sha256 = None
        if bundle.plain_file is not None:
            plain_inputs = {spec.name: inputs_of_steps[0][spec.name] for spec in bundle.inputs}
            _quantize_file(
                bundle.folder / bundle.plain_file, making / bundle.plain_file, plain_inputs
            )
            plain_sha256 = file_sha256(making / bundle.plain_file)
        write_preprocessing(making, bundle.preprocessing)
        known = bundle.calibration
        made = replace(
            bundle,
            folder=making,
            steps=tuple(steps),
            plain_sha256=plain_sha256,
            single_file=None,
            single_sha256=None,
            quantized="int8",
            # What was reached and promised is of another network.
            calibration=known and replace(known, reached=None, guarantee=None, front=None),
        )
        made = write_single(made, join_exits)
        write_bundle(made)
    return replace(made, folder=Path(folder))


def _described(step: Step, folder: Path) -> Step:
    path = folder / step.file
    return replace(step, sha256=file_sha256(path), parameter_bytes=_weight_bytes(path))


def _weight_bytes(path: Path) -> int:
    import onnx

    weights = onnx.load(path).graph.initializer
    return sum(len(onnx.numpy_helper.to_array(weight).tobytes()) for weight in weights)


def _inputs_of_steps(session: Session, samples: Array) -> list[dict[str, Array]]:
    """Collect the inputs of every step, by their ONNX names, if no sample leaves."""
    given = []
    carried: Sequence[Array] = [samples]
    for index in range(len(session.bundle.steps)):
        feed, outputs = session.run_step(index, carried)
        given.append(feed)
        carried = outputs[3:]
    return given


def _quantize_file(source: Path, target: Path, inputs: dict[str, Array]) -> None:
    try:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"Quantising needs {error.name}, which is not installed: pip install 'offramp[train]'"
        ) from error

    operations = {node.op_type for node in onnx.load(source).graph.node}
    with _quiet():
        if "Conv" in operations:
            quantize_static(
                source,
                target,
                _Once(inputs),
                op_types_to_quantize=_QUANTIZED_OPERATIONS,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                **_WEIGHTS,
            )
        else:
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=_QUANTIZED_OPERATIONS,
                weight_type=QuantType.QInt8,
                **_WEIGHTS,
            )


class _Once:
    """Hands one feed to onnxruntime's calibration, then ends."""

    def __init__(self, feed: dict[str, Array]) -> None:
        self._feeds = iter([feed])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        """There is one feed only: nothing to choose from."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the remarks that quantising makes through the root logger."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
