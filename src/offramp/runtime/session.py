"""Running a bundle with numpy and onnxruntime: no torch, no code of the network's own.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from offramp.errors import ArtifactError, InvalidArgumentError, ShapeError, reason
from offramp.results import AdaptiveResult
from offramp.runtime.bundle import SINGLE_OUTPUTS, Bundle, Step, read_bundle, single_numbers
from offramp.runtime.padding import mask_of_inputs, trim_tokens

Array = npt.NDArray[Any]


class Session:
    """Answers batches from a bundle, going on with the samples that are still unsure.

    The same loop as :class:`offramp.AdaptiveRunner`, on onnxruntime sessions. A batch of one runs
    as one graph, which is loaded when the first comes, so that a session that never sees one holds
    its weights once. A session keeps nothing of a call: several threads may call :meth:`run` at
    once.

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
        self._single = None
        if options is None and self.bundle.single_file is not None:
            self._single = _LazySingle(self.bundle, self.bundle.single_file, threads, providers)
        options = options or session_options(threads)
        self._steps = [
            _LoadedStep(path, step, _load(path, options, providers))
            for step in self.bundle.steps
            for path in (self.bundle.folder / step.file,)
        ]
        self._exits = np.array([step.exit_index for step in self.bundle.steps])
        self._exit_macs = np.array([step.exit_macs for step in self.bundle.steps])
        # Of unequal samples: numbers of a polynomial in their tokens, shape (steps, 3).
        self._macs_by_length = np.array([step.exit_macs_by_length for step in self.bundle.steps])

    def run(self, *inputs: npt.ArrayLike) -> AdaptiveResult[Array]:
        """Answer a batch.

        Args:
            inputs: The network's inputs, each with the batch axis first.
        Returns:
            Logits, exit, confidence and MACs of each sample, in the order of the batch.
        Raises:
            ShapeError: If the inputs are not of the shape that the bundle was exported for.
            ArtifactError: If the bundle was replaced after it was opened, and before the first
                batch of one.
        """
        carried = check_inputs(self.bundle, inputs)
        padding = self.bundle.padding
        mask_BT = None if padding is None else mask_of_inputs(padding, carried)
        if mask_BT is not None:
            carried = trim_tokens(carried, self.bundle.inputs, mask_BT)
        if self._single is not None and len(carried[0]) == 1:
            output, confidence_B, step_B = self._single.run(carried)
        else:
            output, confidence_B, step_B = self._run_steps(carried)
        return AdaptiveResult(
            output=output,
            exit_index=self._exits[step_B],
            confidence=confidence_B,
            macs=self._exit_macs[step_B] if mask_BT is None else self._macs(step_B, mask_BT),
        )

    def _run_steps(self, carried: list[Array]) -> tuple[Array, Array, Array]:
        """Logits, confidence and number of the step that each sample left by."""
        rows_B = np.arange(len(carried[0]))
        step_B = np.zeros_like(rows_B)
        answers: tuple[Array, Array] | None = None
        for index, step in enumerate(self._steps):
            output, confidence_B, leave_B, *carried = step.run(step.feed(carried))
            if answers is None:
                answers = output, confidence_B
            else:  # whoever reaches an exit is given its answer, which a later one overwrites
                answers[0][rows_B], answers[1][rows_B] = output, confidence_B
                step_B[rows_B] = index
            stay_B = np.flatnonzero(~leave_B)
            if len(stay_B) == 0:
                break
            if len(stay_B) < len(rows_B):
                rows_B = rows_B[stay_B]
                carried = [tensor.take(stay_B, axis=0) for tensor in carried]
                if self.bundle.padding is not None:
                    mask_BT = carried[self.bundle.padding.mask_index] != 0
                    carried = trim_tokens(carried, self.bundle.steps[index + 1].features, mask_BT)
        assert answers is not None  # a bundle has at least one step
        return *answers, step_B

    def _macs(self, step_B: Array, mask_BT: Array) -> Array:
        """MACs of samples of unequal length, by the step that each left by."""
        lengths_B = mask_BT.sum(1)
        macs_B: Array = (self._macs_by_length[step_B] * lengths_B[:, None] ** np.arange(3)).sum(1)
        return macs_B

    def run_step(
        self, index: int, carried: Sequence[Array]
    ) -> tuple[dict[str, Array], list[Array]]:
        """Run one step on its own.

        Args:
            index: Number of the step, from 0.
            carried: Its features, then its state.
        Returns:
            feed: What the ONNX file was given, by name.
            outputs: Output, confidence and leave of each sample, then what the next step is given.
        """
        step = self._steps[index]
        feed = step.feed(carried)
        return feed, step.run(feed)


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
                "Export the run again with --plain."
            )
        self._session = _load(
            self.bundle.folder / self.bundle.plain_file,
            session_options(threads),
            ("CPUExecutionProvider",),
        )

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


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options for one of several sessions on the same cores.

    Args:
        threads: Threads that compute within an operation; onnxruntime's choice if None.
    Returns:
        Options whose waiting threads do not spin.
    Raises:
        InvalidArgumentError: If there are no threads.
    """
    if threads is not None and threads < 1:
        raise InvalidArgumentError(
            f"The 'threads' parameter must be an int of at least 1. Got {threads}."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def check_inputs(bundle: Bundle, inputs: Sequence[npt.ArrayLike]) -> list[Array]:
    """Bring inputs into the form that a bundle was exported for.

    Args:
        bundle: The bundle.
        inputs: The network's inputs, each with the batch axis first.
    Returns:
        Contiguous arrays of the bundle's types.
    Raises:
        ShapeError: If their number, their shapes or their batch sizes are wrong.
    """
    specs = bundle.inputs
    arrays = [np.asarray(value) for value in inputs]
    fits = len(arrays) == len(specs) and all(
        array.ndim and spec.fits(array.shape[1:]) and len(array) == len(arrays[0]) > 0
        for array, spec in zip(arrays, specs, strict=True)
    )
    if not fits:
        shown = [["T" if n is None else str(n) for n in spec.sample_shape] for spec in specs]
        expected = ", ".join(f"(B, {', '.join(sizes)})" for sizes in shown)
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise ShapeError(f"Expected inputs of shape {expected}, B at least 1. Got {shapes}.")
    return [
        np.ascontiguousarray(array, dtype=spec.dtype)
        for array, spec in zip(arrays, specs, strict=True)
    ]


class _LoadedStep:
    """An ONNX file that maps what is carried from step to step."""

    def __init__(self, path: Path, step: Step, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._names = [value.name for value in session.get_inputs()]
        self._numbers = (
            np.array(step.temperature, dtype=np.float32),
            np.array(step.threshold, dtype=np.float32),
        )
        expected = len(step.features) + len(step.state) + 2
        if len(self._names) != expected:
            raise ArtifactError(
                f"Expected a step with {expected} inputs in {path}. Got one with "
                f"{len(self._names)}. Export the run again."
            )

    def feed(self, carried: Sequence[Array]) -> dict[str, Array]:
        """What the ONNX file is given, by name."""
        return dict(zip(self._names, (*carried, *self._numbers), strict=True))

    def run(self, feed: dict[str, Array]) -> list[Array]:
        """Output, confidence and leave of each sample, then what the next step is given."""
        outputs: list[Array] = self._session.run(None, feed)
        return outputs


class _LazySingle:
    """The file for single samples, loaded when it is first run."""

    def __init__(
        self, bundle: Bundle, name: str, threads: int | None, providers: Sequence[str]
    ) -> None:
        self._path, self._sha256 = bundle.folder / name, bundle.single_sha256
        self._names = [spec.name for spec in bundle.inputs]
        self._providers = providers
        self._options = session_options(threads)
        # Kept: onnxruntime only borrows them.
        self._numbers = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(number, dtype=np.float32))
            for name, number in single_numbers(bundle.steps).items()
        }
        for name, number in self._numbers.items():
            self._options.add_initializer(name, number)
        self._session: onnxruntime.InferenceSession | None = None
        self._lock = threading.Lock()

    def run(self, inputs: Sequence[Array]) -> tuple[Array, Array, Array]:
        """Logits, confidence and number of the step of a batch of one."""
        session = self._session or self._load()
        output, confidence_B, step_B = session.run(
            SINGLE_OUTPUTS, dict(zip(self._names, inputs, strict=True))
        )
        return output, confidence_B, step_B

    def _load(self) -> onnxruntime.InferenceSession:
        with self._lock:
            if self._session is None:
                content = self._path.read_bytes() if self._path.is_file() else b""
                if hashlib.sha256(content).hexdigest() != self._sha256:
                    raise ArtifactError(
                        f"{self._path} is not the file that was there when the bundle was opened: "
                        "it was exported anew or removed since. Open the bundle again."
                    )
                self._session = _load(self._path, self._options, self._providers, content)
            return self._session


def _load(
    path: Path,
    options: onnxruntime.SessionOptions,
    providers: Sequence[str],
    content: bytes | None = None,
) -> onnxruntime.InferenceSession:
    unknown = set(providers) - set(onnxruntime.get_available_providers())
    if unknown:
        raise InvalidArgumentError(
            f"onnxruntime has no {', '.join(sorted(unknown))} here. "
            f"It has {', '.join(onnxruntime.get_available_providers())}."
        )
    try:
        return onnxruntime.InferenceSession(content or path, options, providers=list(providers))
    except Exception as error:  # onnxruntime's own exceptions have no common base but this one
        raise ArtifactError(f"onnxruntime cannot load {path}: {reason(error)}") from error
