"""The steps of a bundle with exits, going on with the samples that are still unsure.

Shapes: ``B`` batch, ``S`` samples that go on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from offramp.errors import ArtifactError
from offramp.results import AdaptiveResult
from offramp.runtime.bundle import SINGLE_OUTPUTS, Bundle, Step, single_numbers
from offramp.runtime.deadline import Deadline
from offramp.runtime.loading import Loader
from offramp.runtime.padding import trim_tokens
from offramp.runtime.step_macs import StepMacs

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """What some consecutive steps made of a batch.

    Attributes:
        output: Raw logits of the last exit that each sample reached, shape (B, C) or dense.
        confidence: The policy's there, shape (B,).
        step: Number of the step that ends with it, shape (B,), int64.
        rows: Samples that none of the steps let go, by their place in the batch, shape (S,).
        carried: What the step behind the last is given of them, each of S rows; meaningless where
            there are none.
    """

    output: Array
    confidence: Array
    step: Array
    rows: Array
    carried: list[Array]


class ExitSteps:
    """Runs the steps of a bundle with exits.

    Args:
        bundle: The bundle.
        loader: Loads its files.
        part: Numbers of the steps to load; all if None.
    Raises:
        ArtifactError: If a file cannot be loaded, or is no step.
    """

    def __init__(self, bundle: Bundle, loader: Loader, part: range | None = None) -> None:
        self._bundle = bundle
        self._single = None
        if part is None:
            self._single = loader.single(SINGLE_OUTPUTS, single_numbers(bundle.steps))
        loaded = range(len(bundle.steps)) if part is None else part
        self._first = loaded.start
        self._steps = [
            _LoadedStep(bundle, bundle.steps[i], loader.load(bundle.steps[i].file)) for i in loaded
        ]
        self._exits = np.array([step.exit_index for step in bundle.steps])
        self._macs = StepMacs(bundle)

    def run(self, carried: list[Array], deadline: Deadline | None = None) -> AdaptiveResult[Array]:
        """Answer a batch.

        Args:
            carried: The network's inputs, as :func:`~offramp.runtime.session.check_inputs` made
                them.
            deadline: When to begin no further step; None for never.
        Returns:
            Logits, exit, confidence and MACs of each sample, in the order of the batch.
        """
        carried, measured = self._macs.trim(carried)
        if self._single is not None and len(carried[0]) == 1 and deadline is None:
            output, confidence_B, step_B = self._single.run(carried)
        else:
            part = self.run_part(carried, deadline)
            output, confidence_B, step_B = part.output, part.confidence, part.step
        return AdaptiveResult(
            output=output,
            exit_index=self._exits[step_B],
            confidence=confidence_B,
            macs=self._macs.of_steps(step_B, measured),
        )

    def plain_macs(self, inputs: list[Array]) -> Array:
        """See :meth:`offramp.runtime.Session.plain_macs`."""
        _, measured = self._macs.trim(inputs)
        return np.broadcast_to(self._macs.of_plain(measured), len(inputs[0]))

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

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """Shape of a sample's logits; None for axes that are as long as the image's."""
        return self._steps[0].output_shape

    def run_part(
        self,
        carried: list[Array],
        deadline: Deadline | None = None,
        *,
        first: int | None = None,
    ) -> PartResult:
        """Run the steps that were loaded, going on with the samples that are still unsure.

        Args:
            carried: What the first of them is given.
            deadline: As for :meth:`run`.
            first: Number of the step to begin with; the first that was loaded if None.
        Returns:
            The answers so far, and what the step behind the last of them is to be given.
        """
        rows_B = np.arange(len(carried[0]))
        first = self._first if first is None else first
        step_B = np.full_like(rows_B, first)
        answers: tuple[Array, Array] | None = None
        for index, step in enumerate(self._steps[first - self._first :], first):
            if deadline is not None and not deadline.allows(index):
                break
            output, confidence_B, leave_B, *carried = step.run(step.feed(carried))
            if answers is None:
                answers = output, confidence_B
            else:  # whoever reaches an exit is given its answer, which a later one overwrites
                answers[0][rows_B], answers[1][rows_B] = output, confidence_B
                step_B[rows_B] = index
            stay_B = np.flatnonzero(~leave_B)
            if len(stay_B) < len(rows_B):
                rows_B = rows_B[stay_B]
                if len(stay_B) == 0:
                    break
                carried = [tensor.take(stay_B, axis=0) for tensor in carried]
                if self._bundle.padding is not None:
                    mask_BT = carried[self._bundle.padding.mask_index] != 0
                    carried = trim_tokens(carried, self._bundle.steps[index + 1].features, mask_BT)
        assert answers is not None  # at least one step was loaded
        return PartResult(
            output=answers[0], confidence=answers[1], step=step_B, rows=rows_B, carried=carried
        )


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

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """Shape of a sample's logits, None for free axes."""
        shape = self._session.get_outputs()[0].shape[1:]
        return tuple(size if isinstance(size, int) else None for size in shape)

    def feed(self, carried: Sequence[Array]) -> dict[str, Array]:
        """What the ONNX file is given, by name."""
        return dict(zip(self._names, (*carried, *self._numbers), strict=True))

    def run(self, feed: dict[str, Array]) -> list[Array]:
        """Output, confidence and leave of each sample, then what the next step is given."""
        outputs: list[Array] = self._session.run(None, feed)
        return outputs
