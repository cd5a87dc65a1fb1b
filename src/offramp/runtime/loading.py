"""Loading a bundle's ONNX files into onnxruntime."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from offramp.errors import ArtifactError, InvalidArgumentError, reason
from offramp.runtime.bundle import Bundle

Array = npt.NDArray[Any]

_DROPS_DIVISION = ["NoopElimination"]
"""The optimiser that takes out a division by the 1 that a file was exported with."""


class Loader:
    """Loads the files of a bundle, all with the same options."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: onnxruntime.SessionOptions | None = None,
    ) -> None:
        self._bundle = bundle
        self._threads = threads
        # Where tokens are dropped, sizes are others in every call.
        self._plans_memory = bundle.halting is None
        self._providers = providers
        self._has_single = options is None and bundle.single_file is not None
        self._options = options or session_options(threads, plans_memory=self._plans_memory)

    def load(self, name: str) -> onnxruntime.InferenceSession:
        """Load a file."""
        return _load(self._bundle.folder / name, self._options, self._providers)

    def single(self, outputs: Sequence[str], numbers: Mapping[str, float]) -> LazySingle | None:
        """Make ready the file for single samples; it is loaded when the first comes."""
        if not self._has_single:
            return None
        # Its own options: they hold the numbers, which other files know nothing of.
        options = session_options(self._threads, plans_memory=self._plans_memory)
        return LazySingle(self._bundle, outputs, numbers, options, self._providers)


class LoadedFile:
    """An ONNX file whose inputs are given in order."""

    def __init__(self, loader: Loader, name: str) -> None:
        self._session = loader.load(name)
        self._names = [value.name for value in self._session.get_inputs()]

    def run(self, *inputs: Array) -> list[Array]:
        """Run the file."""
        outputs: list[Array] = self._session.run(None, dict(zip(self._names, inputs, strict=True)))
        return outputs


class LazySingle:
    """The file for single samples, loaded when it is first run."""

    def __init__(
        self,
        bundle: Bundle,
        outputs: Sequence[str],
        numbers: Mapping[str, float],
        options: onnxruntime.SessionOptions,
        providers: Sequence[str],
    ) -> None:
        self._path, self._sha256 = bundle.folder / str(bundle.single_file), bundle.single_sha256
        self._names = [spec.name for spec in bundle.inputs]
        self._outputs = list(outputs)
        self._providers = providers
        self._options = options
        # Kept: onnxruntime only borrows them.
        self._numbers = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(number, dtype=np.float32))
            for name, number in numbers.items()
        }
        for name, number in self._numbers.items():
            self._options.add_initializer(name, number)
        tempered = any(x != 1 for name, x in numbers.items() if name.startswith("temperature"))
        self._without = _DROPS_DIVISION if tempered else []
        self._session: onnxruntime.InferenceSession | None = None
        self._lock = threading.Lock()

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Answer a batch of one."""
        session = self._session or self._load()
        outputs: list[Array] = session.run(
            self._outputs, dict(zip(self._names, inputs, strict=True))
        )
        return outputs

    def _load(self) -> onnxruntime.InferenceSession:
        with self._lock:
            if self._session is None:
                content = self._path.read_bytes() if self._path.is_file() else b""
                if hashlib.sha256(content).hexdigest() != self._sha256:
                    raise ArtifactError(
                        f"{self._path} is not the file that was there when the bundle was opened: "
                        "it was exported anew or removed since. Open the bundle again."
                    )
                self._session = _load(
                    self._path, self._options, self._providers, content, without=self._without
                )
            return self._session


def session_options(
    threads: int | None = None, *, plans_memory: bool = True
) -> onnxruntime.SessionOptions:
    """Options for one of several sessions on the same cores."""
    if threads is not None and threads < 1:
        raise InvalidArgumentError(
            f"The 'threads' parameter must be an int of at least 1. Got {threads}."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.enable_mem_pattern = plans_memory
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def _load(
    path: Path,
    options: onnxruntime.SessionOptions,
    providers: Sequence[str],
    content: bytes | None = None,
    *,
    without: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    unknown = set(providers) - set(onnxruntime.get_available_providers())
    if unknown:
        raise InvalidArgumentError(
            f"onnxruntime has no {', '.join(sorted(unknown))} here. "
            f"It has {', '.join(onnxruntime.get_available_providers())}."
        )
    try:
        return onnxruntime.InferenceSession(
            content or path, options, providers=list(providers), disabled_optimizers=list(without)
        )
    except Exception as error:  # onnxruntime's own exceptions have no common base but this one
        words = f"onnxruntime cannot load {path}: {reason(error)}"
        if "NOT_IMPLEMENTED" in words:
            words += " It computes most layers in float32 precision only: export network.float()."
        raise ArtifactError(words) from error
