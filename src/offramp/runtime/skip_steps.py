"""The steps of a bundle that skips blocks: each block on the samples whose gate wants it.

Shapes: ``B`` batch, ``G`` gates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.results import AdaptiveResult
from offramp.runtime.bundle import Bundle
from offramp.runtime.family_steps import FamilySteps
from offramp.runtime.loading import LoadedFile, Loader
from offramp.runtime.skip_parts import SKIP_OUTPUTS, SkipStep

Array = npt.NDArray[Any]


class SkipSteps(FamilySteps):
    """Runs gate after gate, and each block on the samples that want it."""

    def __init__(self, bundle: Bundle, loader: Loader) -> None:
        super().__init__(bundle)
        assert bundle.skip is not None  # of this family
        parts = bundle.skip
        self._single = loader.single(SKIP_OUTPUTS, {"threshold": parts.threshold})
        self._stem = LoadedFile(loader, parts.stem.name)
        self._steps = [_LoadedStep(loader, step) for step in parts.steps]
        self._head = LoadedFile(loader, parts.head.name)
        self._threshold = np.array(parts.threshold, dtype=np.float32)
        self._always_macs = parts.always_macs
        self._block_macs = np.array([step.block_macs for step in parts.steps])

    def run(self, inputs: list[Array]) -> AdaptiveResult[Array]:
        """Answer a batch."""
        (x,) = inputs
        if self._single is not None and len(x) == 1:
            output, confidence_B, blocks_BG, macs_B = self._single.run(inputs)
        else:
            output, confidence_B, blocks_BG = self._run_steps(x)
            macs_B = self._always_macs + blocks_BG @ self._block_macs
        return AdaptiveResult(
            output=output,
            exit_index=np.zeros(len(x), dtype=np.int64),
            confidence=confidence_B,
            macs=macs_B,
            blocks=blocks_BG,
        )

    def _run_steps(self, x: Array) -> tuple[Array, Array, Array]:
        """Logits, confidence, and which blocks ran."""
        (x,) = self._stem.run(x)
        state: list[Array] = []
        ran = []
        for step in self._steps:
            run_B, _, *state = step.gate.run(x, *state, self._threshold)
            x = step.run_or_skip(x, run_B)
            ran.append(run_B)
        output, confidence_B = self._head.run(x)
        return output, confidence_B, np.stack(ran, 1)

    def run_every_block(self, inputs: list[Array]) -> tuple[Array, Array, Array]:
        """See :meth:`offramp.runtime.Session.run_every_block`."""
        (x,) = self._stem.run(*inputs)
        state: list[Array] = []
        ran, probabilities = [], []
        for step in self._steps:
            run_B, probability_B, *state = step.gate.run(x, *state, self._threshold)
            x = step.run_and_mask(x, run_B)
            ran.append(run_B)
            probabilities.append(probability_B)
        return self._head.run(x)[0], np.stack(ran, 1), np.stack(probabilities, 1)


class _LoadedStep:
    """A gate, its block, and the way around it."""

    def __init__(self, loader: Loader, step: SkipStep) -> None:
        self.gate = LoadedFile(loader, step.gate.name)
        self._block = LoadedFile(loader, step.block.name)
        self._around = None if step.around is None else LoadedFile(loader, step.around.name)

    def run_or_skip(self, x: Array, run_B: Array) -> Array:
        """Run the block on those that want it, and put what comes out back in its place."""
        rows = np.flatnonzero(run_B)
        if len(rows) == len(x):
            return self._block.run(x)[0]
        if len(rows) == 0:
            return self._skip(x)
        ran = self._block.run(x.take(rows, axis=0))[0]
        if self._around is None:
            x[rows] = ran  # ours to write on: the stem made it, or a block
            return x
        others = np.flatnonzero(~run_B)
        y = np.empty((len(x), *ran.shape[1:]), dtype=ran.dtype)
        y[rows], y[others] = ran, self._skip(x.take(others, axis=0))
        return y

    def run_and_mask(self, x: Array, run_B: Array) -> Array:
        """Run the block on all, and keep what comes out for those that want it."""
        run_B1 = run_B.reshape(-1, *(1,) * (x.ndim - 1))
        masked: Array = np.where(run_B1, self._block.run(x)[0], self._skip(x))
        return masked

    def _skip(self, x: Array) -> Array:
        return x if self._around is None else self._around.run(x)[0]
