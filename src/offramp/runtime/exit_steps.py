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
from offramp.runtime.bundle import SINGLE_OUTPUTS, Bundle, Step, single_numbers
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

    def run(self, carried: list[Array]) -> AdaptiveResult[Array]:
        """Answer a batch.

        Args:
            carried: The network's inputs, as :func:`~offramp.runtime.session.check_inputs` made
                them.
        Returns:
            Logits, exit, confidence and MACs of each sample, in the order of the batch.
        """
        padding = self._bundle.padding
        mask_BT = None if padding is None else mask_of_inputs(padding, carried)
        if mask_BT is not None:
            carried = trim_tokens(carried, self._bundle.inputs, mask_BT)
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

    def run_step(
        self, index: int, carried: Sequence[Array]
    ) -> tuple[dict[str, Array], list[Array]]:
        """See :meth:`offramp.runtime.Session.run_step`."""
        step = self._steps[index]
        feed = step.feed(carried)
        return feed, step.run(feed)

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
                if self._bundle.padding is not None:
                    mask_BT = carried[self._bundle.padding.mask_index] != 0
                    carried = trim_tokens(carried, self._bundle.steps[index + 1].features, mask_BT)
        assert answers is not None  # a bundle has at least one step
        return *answers, step_B

    def _macs(self, step_B: Array, mask_BT: Array) -> Array:
        """MACs of samples of unequal length, by the step that each left by."""
        lengths_B = mask_BT.sum(1)
        macs_B: Array = (self._macs_by_length[step_B] * lengths_B[:, None] ** np.arange(3)).sum(1)
        return macs_B


class _LoadedStep:
    """An ONNX file that maps what is carried from step to step."""

    def __init__(self, bundle: Bundle, step: Step, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._names = [value.name for value in session.get_inputs()]
        self._numbers = (
            np.array(step.temperature, dtype=np.float32),
            np.array(step.threshold, dtype=np.float32),
        )
        expected = len(step.features) + len(step.state) + 2
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
