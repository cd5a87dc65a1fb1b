"""The steps of a bundle: each family has a kind, which refuses what only others can do.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import InvalidArgumentError
from offramp.results import AdaptiveResult
from offramp.runtime.bundle import Bundle

Array = npt.NDArray[Any]


class FamilySteps(ABC):
    """Runs the files of a bundle on inputs that were checked.

    Each method is described where :class:`~offramp.runtime.Session` offers it by the same name.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    @abstractmethod
    def run(self, inputs: list[Array]) -> AdaptiveResult[Array]:
        """Answer a batch."""

    def plain_macs(self, inputs: list[Array]) -> Array:
        """Count what each sample would cost the plain network; by default all cost the same."""
        return np.full(len(inputs[0]), self.bundle.plain_macs)

    def run_in_time(
        self, inputs: list[Array], deadline_ms: float, step_ms: Sequence[float] | None
    ) -> AdaptiveResult[Array]:
        """Answer a batch before a deadline, by what each step takes."""
        raise self._no_exits()

    def time_steps(self, inputs: list[Array]) -> tuple[float, ...]:
        """Measure what each step takes."""
        raise self._no_exits()

    def run_step(
        self, index: int, carried: Sequence[Array]
    ) -> tuple[dict[str, Array], list[Array]]:
        """Run one step on its own, up to its exit."""
        raise self._no_exits()

    def run_every_block(self, inputs: list[Array]) -> tuple[Array, Array, Array]:
        """Run every gate and every block on every sample."""
        raise self._refusal("that skips blocks", ": it has no gates")

    def run_every_token(self, inputs: list[Array]) -> tuple[Array, Array, Array]:
        """Run every layer on every token."""
        raise self._refusal("whose tokens halt")

    def _no_exits(self) -> InvalidArgumentError:
        return self._refusal("with exits", ": its steps give no answers of their own")

    def _refusal(self, expected: str, why: str = "") -> InvalidArgumentError:
        return InvalidArgumentError(
            f"Expected a bundle of a network {expected}. {self.bundle.folder} holds one of the "
            f"family {self.bundle.family}{why}."
        )
