"""Stopping in time: a step that would end too late by its measured time is not started."""

from __future__ import annotations

import time
from collections.abc import Sequence

from offramp.errors import InvalidArgumentError


class Deadline:
    """Runs from when it is made."""

    def __init__(self, deadline_ms: float, step_ms: Sequence[float] | None) -> None:
        if not deadline_ms > 0:
            raise InvalidArgumentError(
                f"The 'deadline_ms' parameter must be a number above 0. Got {deadline_ms}."
            )
        if step_ms is None:
            raise InvalidArgumentError(
                "A deadline needs to know what each step takes: call time_steps(...) once, on "
                "inputs like those to come."
            )
        self._step_ms = step_ms
        self._end = time.perf_counter() + deadline_ms / 1e3

    def allows(self, step: int) -> bool:
        """Tell whether a step would end in time; the first always runs, or nobody had an answer."""
        return step == 0 or time.perf_counter() + self._step_ms[step] / 1e3 <= self._end
