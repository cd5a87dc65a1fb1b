"""What samples cost that left a network by some exit, as ``bundle.json`` counts it.

Shapes: ``B`` batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.runtime.bundle import Bundle
from offramp.runtime.dense import macs_at
from offramp.runtime.padding import mask_of_inputs, trim_tokens

Array = npt.NDArray[Any]
Measured = Array | tuple[int, ...]
"""What MACs go by: tokens of each sample, shape (B,), or height and width of the images."""


class StepMacs:
    """MACs of the samples of a bundle with exits.

    Args:
        bundle: The bundle.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._exits = np.array([step.exit_index for step in bundle.steps])
        self._exit_macs = np.array([step.exit_macs for step in bundle.steps])
        # Of unequal samples: numbers of a polynomial in their tokens, shape (steps, 3).
        self._by_length = np.array([step.exit_macs_by_length for step in bundle.steps])
        self._by_size = [step.exit_macs_by_size for step in bundle.steps]

    def trim(self, inputs: list[Array]) -> tuple[list[Array], Measured]:
        """Cut off the padding that all samples have, and measure what MACs go by.

        Args:
            inputs: The network's inputs.
        Returns:
            The inputs, and what was measured.
        """
        padding = self._bundle.padding
        if padding is None:
            return inputs, inputs[0].shape[2:]
        mask_BT = mask_of_inputs(padding, inputs)
        return trim_tokens(inputs, self._bundle.inputs, mask_BT), mask_BT.sum(1)

    def of_steps(self, step_B: Array, measured: Measured) -> Array:
        """MACs of each sample by the number of the step that it left by.

        Args:
            step_B: Numbers of steps, shape (B,).
            measured: As :meth:`trim` says.
        Returns:
            Shape (B,), int64.
        """
        if self._bundle.pixel_multiple is not None:
            numbers = [by_size for by_size in self._by_size if by_size is not None]
            height, width = measured
            return macs_at(numbers, int(height), int(width))[step_B]
        if self._bundle.padding is None:
            of_all: Array = self._exit_macs[step_B]
            return of_all
        lengths_B = np.asarray(measured)
        macs_B: Array = (self._by_length[step_B] * lengths_B[:, None] ** np.arange(3)).sum(1)
        return macs_B

    def of_exits(self, exit_index_B: Array, measured: Measured) -> Array:
        """MACs of each sample by the exit that it left by.

        Args:
            exit_index_B: Exits that are on, shape (B,).
            measured: As :meth:`trim` says.
        Returns:
            Shape (B,), int64.
        """
        return self.of_steps(np.searchsorted(self._exits, exit_index_B), measured)
