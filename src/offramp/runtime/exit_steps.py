"""The steps of a bundle with exits, going on with the samples that are still unsure.

Shapes: ``B`` batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from offramp.errors import ArtifactError
from offramp.results import AdaptiveResult
from offramp.runtime.bundle import SINGLE_OUTPUTS, Bundle, single_numbers
from offramp.runtime.deadline import Deadline
from offramp.runtime.family_steps import FamilySteps
from offramp.runtime.loading import Loader
from offramp.runtime.loop import PartResult, run_steps, time_steps
from offramp.runtime.padding import trim_tokens
from offramp.runtime.step_macs import StepMacs

Array = npt.NDArray[Any]
Part = PartResult[Array, list[Array]]


class _NumpyEngine:
    """Indexes numpy arrays; see :class:`~offramp.runtime.loop.Engine`."""

    nobody: Array = np.empty(0, dtype=np.int64)

    def rows(self, output: Array) -> Array:
        return np.arange(len(output))

    def stayers(self, leave: Array) -> Array:
        return np.flatnonzero(~leave)

    def take(self, rows: Array, places: Array) -> Array:
        taken: Array = rows[places]
        return taken

    def own(self, values: Array) -> Array:
        return values  # onnxruntime gives them away

    def put(self, into: Array, rows: Array, values: Array) -> Array:
        into[rows] = values
        return into

    def last(self, reached: Sequence[tuple[int, Array]]) -> Array:
        (number, rows_B), *later = reached
        last_B = np.full_like(rows_B, number)
        for number, rows in later:
            last_B[rows] = number
        return last_B


_ENGINE = _NumpyEngine()


class ExitSteps(FamilySteps):
    """Runs the steps of a bundle with exits; ``part`` are those to load, all if None."""

    def __init__(self, bundle: Bundle, loader: Loader, part: range | None = None) -> None:
        super().__init__(bundle)
        self._single = None
        if part is None:
            self._single = loader.single(SINGLE_OUTPUTS, single_numbers(bundle.steps))
        loaded = range(len(bundle.steps)) if part is None else part
        self._first = loaded.start
        self._steps = [_LoadedStep(bundle, i, loader.load(bundle.steps[i].file)) for i in loaded]
        self._exits = np.array([step.exit_index for step in bundle.steps])
        self._macs = StepMacs(bundle)

    def run(self, carried: list[Array], deadline: Deadline | None = None) -> AdaptiveResult[Array]:
        """Answer a batch that :func:`~offramp.runtime.session.check_inputs` checked."""
        carried, measured = self._macs.trim(carried)
        if self._single is not None and len(carried[0]) == 1 and deadline is None:
            output, confidence_B, step_B = self._single.run(carried)
            exit_index_B = self._exits[step_B]
        else:
            part = self.run_part(carried, deadline)
            output, confidence_B, exit_index_B = part.output, part.confidence, part.exit_index
        return AdaptiveResult(
            output=output,
            exit_index=exit_index_B,
            confidence=confidence_B,
            macs=self._macs.of_exits(exit_index_B, measured),
        )

    def run_in_time(
        self, inputs: list[Array], deadline_ms: float, step_ms: Sequence[float] | None
    ) -> AdaptiveResult[Array]:
        """Answer a batch; a step that would end too late is not started."""
        return self.run(inputs, Deadline(deadline_ms, step_ms))

    def plain_macs(self, inputs: list[Array]) -> Array:
        """Count by the size of the images, or the length of each text, where these differ."""
        if self.bundle.padding is None and self.bundle.pixel_multiple is None:
            return super().plain_macs(inputs)
        _, measured = self._macs.trim(inputs)
        return np.broadcast_to(self._macs.of_plain(measured), len(inputs[0]))

    def run_step(
        self, index: int, carried: Sequence[Array]
    ) -> tuple[dict[str, Array], list[Array]]:
        """See :meth:`offramp.runtime.Session.run_step`."""
        step = self._steps[index]
        feed = step.feed(carried)
        return feed, step.compute(feed)

    def time_steps(self, carried: list[Array]) -> tuple[float, ...]:
        """See :meth:`offramp.runtime.Session.time_steps`."""
        return time_steps(self._steps, carried, _ENGINE)

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
    ) -> Part:
        """Run the loaded steps from number ``first`` on."""
        first = self._first if first is None else first
        steps = self._steps[first - self._first :]
        return run_steps(steps, carried, _ENGINE, first=first, deadline=deadline)


class _LoadedStep:
    """An ONNX file that maps what is carried from step to step."""

    def __init__(self, bundle: Bundle, index: int, session: onnxruntime.InferenceSession) -> None:
        step = bundle.steps[index]
        self.exit_index = step.exit_index
        self.is_final = index == len(bundle.steps) - 1
        self._padding = bundle.padding
        self._next_features = () if self.is_final else bundle.steps[index + 1].features
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
        """Name the inputs of the ONNX file."""
        return dict(zip(self._names, (*carried, *self._numbers), strict=True))

    def compute(self, feed: dict[str, Array]) -> list[Array]:
        """Output, confidence and leave of each sample, then what the next step is given."""
        outputs: list[Array] = self._session.run(None, feed)
        return outputs

    def run(self, carried: Sequence[Array]) -> tuple[Array, Array, Array, list[Array]]:
        """See :meth:`offramp.runtime.loop.Step.run`."""
        output, confidence_B, leave_B, *carried = self.compute(self.feed(carried))
        return output, confidence_B, leave_B, carried

    def take(self, carried: list[Array], rows: Array) -> list[Array]:
        """See :meth:`offramp.runtime.loop.Step.take`; without padding that all rows have."""
        taken = [tensor.take(rows, axis=0) for tensor in carried]
        if self._padding is None:
            return taken
        return trim_tokens(taken, self._next_features, taken[self._padding.mask_index] != 0)
