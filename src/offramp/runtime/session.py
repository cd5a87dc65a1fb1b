"""Running a bundle with numpy and onnxruntime: no torch, no code of the network's own.

Shapes: ``B`` batch, ``C`` classes, ``G`` gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from offramp.errors import ArtifactError, InvalidArgumentError, ShapeError, reason
from offramp.results import AdaptiveResult
from offramp.runtime.bundle import Bundle, read_bundle
from offramp.runtime.dense import label_maps
from offramp.runtime.exit_steps import ExitSteps
from offramp.runtime.family_steps import FamilySteps
from offramp.runtime.halting_steps import HaltingSteps
from offramp.runtime.loading import Loader
from offramp.runtime.padding import mask_of_inputs, trim_tokens
from offramp.runtime.skip_steps import SkipSteps

Array = npt.NDArray[Any]

_STEPS: dict[str, Callable[[Bundle, Loader], FamilySteps]] = {
    "exits": ExitSteps,
    "skip": SkipSteps,
    "halting": HaltingSteps,
}
"""By the family of a bundle, what runs it."""


class Session:
    """Answers batches from a bundle, running on each sample what it needs.

    The same loops as :class:`offramp.AdaptiveRunner`, :class:`offramp.SkipRunner` and
    :class:`offramp.HaltingRunner`, on onnxruntime sessions; the bundle's family says which. A
    batch of one runs as one graph, which is loaded when the first comes, so that a session that
    never sees one holds its weights once. A session keeps nothing of a call: several threads may
    call :meth:`run` at once.

    Args:
        bundle: A bundle's folder, or what :func:`~offramp.runtime.read_bundle` made of it.
        threads: Threads that compute within an operation; onnxruntime's choice if None.
        providers: Execution providers of onnxruntime, best first.
        options: Session options, instead of ours; ``threads`` is then left to them, and single
            samples go step by step. Ours do not let waiting threads spin: the pools of several
            sessions would take each other's cores.
    Raises:
        ArtifactError: If the bundle is damaged, incomplete, foreign or too new.
        InvalidArgumentError: If there are no threads, or a provider is not available.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: onnxruntime.SessionOptions | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        loader = Loader(self.bundle, threads=threads, providers=providers, options=options)
        self._steps = _STEPS[self.bundle.family](self.bundle, loader)
        self.step_ms: tuple[float, ...] | None = None
        """Result of :meth:`time_steps`; None before."""

    def run(
        self, *inputs: npt.ArrayLike, deadline_ms: float | None = None
    ) -> AdaptiveResult[Array]:
        """Answer a batch.

        Args:
            inputs: The network's inputs, each with the batch axis first.
            deadline_ms: A step that would end later than so many milliseconds after the call, by
                what :meth:`time_steps` measured, is not started: whoever is left gets the answer
                of the exit before it. The first step always runs.
        Returns:
            Logits, exit, confidence and MACs of each sample, in the order of the batch; and which
            blocks ran, where the network skips some, or how many tokens, where they halt.
        Raises:
            ShapeError: If the inputs are not of the shape that the bundle was exported for.
            ArtifactError: If the bundle was replaced after it was opened, and before the first
                batch of one.
            InvalidArgumentError: If the deadline is not above 0, the steps were not timed, or the
                network skips blocks.
        """
        arrays = check_inputs(self.bundle, inputs)
        if deadline_ms is None:
            return self._steps.run(arrays)
        return self._steps.run_in_time(arrays, deadline_ms, self.step_ms)

    def label_maps(
        self, *inputs: npt.ArrayLike, deadline_ms: float | None = None
    ) -> AdaptiveResult[Array]:
        """Answer a batch of images with a class for every pixel.

        Args:
            inputs: As for :meth:`run`.
            deadline_ms: As for :meth:`run`.
        Returns:
            As :meth:`run`, with labels as output, of the images' own size: shape (B, H, W), uint8.
        Raises:
            ShapeError: As :meth:`run`, or if the network says one class for a sample.
            InvalidArgumentError: As :meth:`run`.
        """
        result = self.run(*inputs, deadline_ms=deadline_ms)
        return replace(result, output=label_maps(result.output, np.shape(inputs[0])[2:]))

    def plain_macs(self, *inputs: npt.ArrayLike) -> Array:
        """Count what each sample would cost the plain network, padding left out.

        Args:
            inputs: As for :meth:`run`.
        Returns:
            MACs of each sample, shape (B,), int64.
        Raises:
            ShapeError: As :meth:`run`.
        """
        return self._steps.plain_macs(check_inputs(self.bundle, inputs))

    def time_steps(self, *inputs: npt.ArrayLike) -> tuple[float, ...]:
        """Measure what each step takes, so that a deadline can be kept.

        Args:
            inputs: A batch like those to come.
        Returns:
            Milliseconds of each step, nobody leaving: medians, kept in ``step_ms``.
        Raises:
            InvalidArgumentError: If the network skips blocks.
            ShapeError: If the inputs are not of the shape that the bundle was exported for.
        """
        self.step_ms = self._steps.time_steps(check_inputs(self.bundle, inputs))
        return self.step_ms

    def run_step(
        self, index: int, carried: Sequence[Array]
    ) -> tuple[dict[str, Array], list[Array]]:
        """Run one step on its own, up to its exit.

        Args:
            index: Number of the step, from 0.
            carried: Its features, then its state.
        Returns:
            feed: What the ONNX file was given, by name.
            outputs: Output, confidence and leave of each sample, then what the next step is given.
        Raises:
            InvalidArgumentError: If the network has one exit: its steps end with none.
        """
        return self._steps.run_step(index, carried)

    def run_every_block(self, *inputs: npt.ArrayLike) -> tuple[Array, Array, Array]:
        """Run every gate and every block on every sample, and choose afterwards.

        What skipping must equal, and the published code's way.

        Args:
            inputs: The network's input, with the batch axis first.
        Returns:
            output: Raw logits, shape (B, C).
            blocks: Which blocks count, shape (B, G), bool.
            probability: With which each block should run, shape (B, G).
        Raises:
            InvalidArgumentError: If the network skips no blocks.
            ShapeError: If the input is not of the shape that the bundle was exported for.
        """
        return self._steps.run_every_block(check_inputs(self.bundle, inputs))

    def run_every_token(self, *inputs: npt.ArrayLike) -> tuple[Array, Array, Array]:
        """Run every layer on every token, and mask those that have halted.

        What dropping must equal, and the published code's way.

        Args:
            inputs: The network's inputs, each with the batch axis first.
        Returns:
            output: Raw logits, shape (B, C).
            tokens: Tokens that count in each layer, shape (B, L), int64.
            margin: How near the sum of a token's scores comes to the threshold behind each layer's
                step, shape (B, L).
        Raises:
            InvalidArgumentError: If no tokens halt.
            ShapeError: If the inputs are not of the shape that the bundle was exported for.
        """
        return self._steps.run_every_token(check_inputs(self.bundle, inputs))


class PlainSession:
    """The plain network of a bundle, so that a device can measure what leaving early saves there.

    Args:
        bundle: A bundle's folder, or what :func:`~offramp.runtime.read_bundle` made of it.
        threads: As for :class:`Session`.
    Raises:
        ArtifactError: If the bundle holds no plain network.
    """

    def __init__(self, bundle: Bundle | Path | str, *, threads: int | None = None) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        if self.bundle.plain_file is None:
            raise ArtifactError(
                f"The bundle {self.bundle.folder} holds no plain network. "
                "Export the run again with plain=True."
            )
        self._session = Loader(self.bundle, threads=threads).load(self.bundle.plain_file)

    def run(self, *inputs: npt.ArrayLike) -> Array:
        """Compute the final exit's logits.

        Args:
            inputs: The network's inputs, each with the batch axis first.
        Returns:
            Raw logits, shape (B, C), float32.
        """
        features = check_inputs(self.bundle, inputs)
        if self.bundle.padding is not None:
            mask_BT = mask_of_inputs(self.bundle.padding, features)
            features = trim_tokens(features, self.bundle.inputs, mask_BT)
        names = [spec.name for spec in self.bundle.inputs]
        logits: Array = self._session.run(None, dict(zip(names, features, strict=True)))[0]
        return logits


def check_inputs(bundle: Bundle, inputs: Sequence[npt.ArrayLike]) -> list[Array]:
    """Bring inputs into the form that a bundle was exported for."""
    specs = bundle.inputs
    arrays = [_array(value) for value in inputs]
    multiple = bundle.pixel_multiple or 1
    fits = len(arrays) == len(specs) and all(
        array.ndim and spec.fits(array.shape[1:], multiple) and len(array) == len(arrays[0]) > 0
        for array, spec in zip(arrays, specs, strict=True)
    )
    if not fits:
        free = iter("HW") if bundle.pixel_multiple else repeat("T")
        shown = [[next(free) if n is None else str(n) for n in s.sample_shape] for s in specs]
        expected = ", ".join(f"(B, {', '.join(sizes)})" for sizes in shown)
        sizes = f", H and W multiples of {multiple}" if bundle.pixel_multiple else ""
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ShapeError(f"Expected inputs of shape {expected}, B at least 1{sizes}. Got {shapes}.")
    for array, spec in zip(arrays, specs, strict=True):
        wants_floats = np.dtype(spec.dtype).kind == "f"
        if wants_floats and array.dtype.kind != "f":
            raise InvalidArgumentError(
                f"Expected {spec.name} as {spec.dtype}. Got {array.dtype}: scale it to floats as "
                "in training."
            )
        if not wants_floats and array.dtype.kind == "f" and (array != np.rint(array)).any():
            raise InvalidArgumentError(
                f"Expected {spec.name} as {spec.dtype}. Got {array.dtype} with fractions."
            )
    return [
        np.ascontiguousarray(array, dtype=spec.dtype)
        for array, spec in zip(arrays, specs, strict=True)
    ]


def _array(value: npt.ArrayLike) -> Array:
    """An array of numbers; of a tensor that needs gradients too."""
    detach = getattr(value, "detach", None)
    try:
        array = np.asarray(value if detach is None else detach())
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"Expected inputs as arrays of numbers. Got a {type(value).__name__} that makes none: "
            f"{reason(error)}."
        ) from error
    if array.dtype.kind not in "fiub":
        raise InvalidArgumentError(
            f"Expected inputs as arrays of numbers, in the order of the network's. Got a "
            f"{type(value).__name__} of {array.dtype}."
        )
    return array
