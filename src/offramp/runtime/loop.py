"""The one loop over the steps of a network with exits: who is sure leaves, the others go on.

Neither torch nor numpy: an engine indexes the arrays of its library.

Shapes: ``B`` batch, ``S`` samples that go on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Generic, Protocol, TypeVar

from offramp.runtime.deadline import Deadline

A = TypeVar("A", bound=Sized)
"""An array of an engine, with the batch axis first."""
C = TypeVar("C")
"""Anything that is carried from step to step."""

_TIMED_ROUNDS = 7
_WARM_UP_ROUNDS = 2


class Step(Protocol[A, C]):
    """Some stages in a row, and the exit behind them."""

    @property
    def exit_index(self) -> int:
        """Number of the exit."""

    @property
    def is_final(self) -> bool:
        """True if all leave here, so that nobody is asked."""

    def run(self, carried: C) -> tuple[A, A, A, C]:
        """Output, confidence and leave of each sample, then what the next step is given."""

    def take(self, carried: C, rows: A) -> C:
        """Some rows of what the next step is given."""


class Engine(Protocol[A]):
    """Indexes the arrays of one library."""

    nobody: A
    """No rows."""

    def rows(self, output: A) -> A:
        """Number the samples of a batch, shape (B,)."""

    def stayers(self, leave: A) -> A:
        """Places of the samples that do not leave, shape (S,)."""

    def take(self, rows: A, places: A) -> A:
        """Rows at some places."""

    def own(self, values: A) -> A:
        """Make an array that may be written on."""

    def put(self, into: A, rows: A, values: A) -> A:
        """Put values in their rows, in place or not."""

    def last(self, reached: Sequence[tuple[int, A]]) -> A:
        """Number that each row stands under last, shape (B,), int64; the first one has all rows."""


@dataclass(frozen=True, kw_only=True)
class PartResult(Generic[A, C]):
    """Answers of some consecutive steps to a batch.

    Attributes:
        output: Raw logits of the last exit that each sample reached, shape (B, C) or dense.
        confidence: The policy's there, shape (B,).
        exit_index: That exit, shape (B,), int64.
        rows: Samples that none of the steps let go, by their place in the batch, shape (S,).
        carried: What the step behind the last is given of them, each of S rows; meaningless where
            there are none.
    """

    output: A
    confidence: A
    exit_index: A
    rows: A
    carried: C


def run_steps(
    steps: Sequence[Step[A, C]],
    carried: C,
    engine: Engine[A],
    *,
    first: int = 0,
    deadline: Deadline | None = None,
) -> PartResult[A, C]:
    """Run steps, going on with the samples that are still unsure.

    A sample that reaches an exit is given its answer, which a later exit overwrites: so the answers
    stand in the order of the batch, and the leavers need no indexing at all.
    ``first`` is the number of the first step, which the deadline goes by.
    """
    reached: list[tuple[int, A]] = []
    for index, step in enumerate(steps, first):
        if deadline is not None and not deadline.allows(index):
            break
        output, confidence_B, leave_B, carried = step.run(carried)
        if not reached:
            rows_B = engine.rows(output)
            answers = engine.own(output), engine.own(confidence_B)
        else:
            answers = (
                engine.put(answers[0], rows_B, output),
                engine.put(answers[1], rows_B, confidence_B),
            )
        reached.append((step.exit_index, rows_B))
        stay_B = engine.nobody if step.is_final else engine.stayers(leave_B)
        if len(stay_B) == 0:
            rows_B = stay_B
            break
        if len(stay_B) < len(rows_B):
            rows_B = engine.take(rows_B, stay_B)
            carried = step.take(carried, stay_B)
    return PartResult(
        output=answers[0],
        confidence=answers[1],
        exit_index=engine.last(reached),
        rows=rows_B,
        carried=carried,
    )


def time_steps(steps: Sequence[Step[A, C]], carried: C, engine: Engine[A]) -> tuple[float, ...]:
    """Measure the milliseconds of each step, nobody leaving: medians."""
    laps = [_lap(steps, carried, engine) for _ in range(_TIMED_ROUNDS + _WARM_UP_ROUNDS)]
    return tuple(map(median, zip(*laps[_WARM_UP_ROUNDS:], strict=True)))


def _lap(steps: Sequence[Step[A, C]], carried: C, engine: Engine[A]) -> list[float]:
    marks = [time.perf_counter()]
    for step in steps:
        _, _, leave_B, carried = step.run(carried)
        engine.stayers(leave_B)  # waits for the device
        marks.append(time.perf_counter())
    return [1e3 * (end - start) for start, end in pairwise(marks)]
