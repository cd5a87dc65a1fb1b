"""The steps of a bundle with exits, going on with the samples that are still unsure.

Shapes: ``B`` batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from offramp.errors import ArtifactError
from offramp.results import AdaptiveResult
from offramp.runtime.bundle import SINGLE_OUTPUTS, Bundle, Step, single_numbers
from offramp.runtime.deadline import Deadline
from offramp.runtime.dense import macs_at
from offramp.runtime.loading import Loader
from offramp.runtime.padding import mask_of_inputs, trim_tokens

Array = npt.NDArray[Any]


class ExitSteps:
    """Runs the steps of a bundle with exits.

    Args:
        bundle: The bundle.
        loader: Loads its files.
    Raises:
        ArtifactError: If a file cannot be loaded, or is no step.
    """

    def __init__(self, bundle: Bundle, loader: Loader) -> None:
        self._bundle = bundle
        self._single = loader.single(SINGLE_OUTPUTS, single_numbers(bundle.steps))
        self._steps = [_LoadedStep(bundle, step, loader.load(step.file)) for step in bundle.steps]
        self._exits = np.array([step.exit_index for step in bundle.steps])
        self._exit_macs = np.array([step.exit_macs for step in bundle.steps])
        # Of unequal samples: numbers of a polynomial in their tokens, shape (steps, 3).
        self._macs_by_length = np.array([step.exit_macs_by_length for step in bundle.steps])
        self._macs_by_size = [step.exit_macs_by_size for step in bundle.steps]

    def run(self, carried: list[Array], deadline: Deadline | None = None) -> AdaptiveResult[Array]:
        """Answer a batch.

        Args:
            carried: The network's inputs, as :func:`~offramp.runtime.session.check_inputs` made
                them.
            deadline: When to begin no further step; None for never.
        Returns:
            Logits, exit, confidence and MACs of each sample, in the order of the batch.
        """
        padding = self._bundle.padding
        mask_BT = None if padding is None else mask_of_inputs(padding, carried)
        if mask_BT is not None:
            carried = trim_tokens(carried, self._bundle.inputs, mask_BT)
        size = carried[0].shape[2:]
        if self._single is not None and len(carried[0]) == 1 and deadline is None:
            output, confidence_B, step_B = self._single.run(carried)
        else:
            output, confidence_B, step_B = self._run_steps(carried, deadline)
        return AdaptiveResult(
            output=output,
            exit_index=self._exits[step_B],
            confidence=confidence_B,
            macs=self._macs(step_B, mask_BT, size),
        )

    def run_step(
        self, index: int, carried: Sequence[Array]
    ) -> tuple[dict[str, Array], list[Array]]:
        """See :meth:`offramp.runtime.Session.run_step`."""
        step = self._steps[index]
        feed = step.feed(carried)
        return feed, step.run(feed)

    def time_steps(self, carried: list[Array]) -> list[float]:
        """Milliseconds of each step once, nobody leaving."""
        marks = [time.perf_counter()]
        for step in self._steps:
            _, _, _, *carried = step.run(step.feed(carried))
            marks.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in pairwise(marks)]

    def _run_steps(
        self, carried: list[Array], deadline: Deadline | None
    ) -> tuple[Array, Array, Array]:
        """Logits, confidence and number of the step that each sample left by."""
        rows_B = np.arange(len(carried[0]))
        step_B = np.zeros_like(rows_B)
        answers: tuple[Array, Array] | None = None
        for index, step in enumerate(self._steps):
            if deadline is not None and not deadline.allows(index):
                break
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
                if self._bundle.padding is not None:
                    mask_BT = carried[self._bundle.padding.mask_index] != 0
                    carried = trim_tokens(carried, self._bundle.steps[index + 1].features, mask_BT)
        assert answers is not None  # a bundle has at least one step
        return *answers, step_B

    def _macs(self, step_B: Array, mask_BT: Array | None, size: tuple[int, ...]) -> Array:
        """MACs of each sample by the step that it left by, and by its length or its size."""
        if self._bundle.pixel_multiple is not None:
            numbers = [by_size for by_size in self._macs_by_size if by_size is not None]
            return macs_at(numbers, size[0], size[1])[step_B]
        if mask_BT is None:
            of_all: Array = self._exit_macs[step_B]
            return of_all
        lengths_B = mask_BT.sum(1)
        macs_B: Array = (self._macs_by_length[step_B] * lengths_B[:, None] ** np.arange(3)).sum(1)
        return macs_B


class _LoadedStep:
    """An ONNX file that maps what is carried from step to step."""

    def __init__(self, bundle: Bundle, step: Step, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._names = [value.name for value in session.get_inputs()]
        self._numbers = [np.array(value, dtype=np.float32) for value in step.numbers.values()]
        expected = len(step.features) + len(step.state) + len(self._numbers)
        if len(self._names) != expected:
            raise ArtifactError(
                f"Expected a step with {expected} inputs in {bundle.folder / step.file}. Got one "
                f"with {len(self._names)}. Export the run again."
            )

    def feed(self, carried: Sequence[Array]) -> dict[str, Array]:
        """What the ONNX file is given, by name."""
        return dict(zip(self._names, (*carried, *self._numbers), strict=True))

    def run(self, feed: dict[str, Array]) -> list[Array]:
        """Output, confidence and leave of each sample, then what the next step is given."""
        outputs: list[Array] = self._session.run(None, feed)
        return outputs
