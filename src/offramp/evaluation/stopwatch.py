"""Contenders timed in turn, so that what else the machine does falls on all of them.

Two engines in one process take each other's cores, so each may have a process of its own, which
answers one line on its standard input with one line on its standard output.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from offramp.errors import OfframpError

LEAST_SAMPLES = 64
"""So many samples are timed at least, or all there are: fewer say little of who leaves where."""
_ROUND_S = 0.5
"""A contender's turn takes about this long, unless fewer samples than those would fit."""
_MAX_BATCHES = 64
_WARM_UP_ROUNDS = 2
_WARM_AFTER_S = 5.0
"""A round that takes so long needs no other to warm up."""
_LEAST_ROUNDS = 2


def representative_rows(cost_N: Sequence[float] | None, count: int) -> list[int]:
    """Choose samples that stand for more: evenly spread over all, from the cheapest to the dearest.

    Example:
        >>> representative_rows([9, 1, 1, 1, 9, 1, 1, 1], 4)
        [2, 4, 5, 7]
    """
    if cost_N is None:
        return list(range(count))
    cheap_first = sorted(range(len(cost_N)), key=cost_N.__getitem__)
    places = [(2 * i + 1) * len(cost_N) // (2 * count) for i in range(count)]
    return sorted(cheap_first[place] for place in places)


class Prepared(NamedTuple):
    """Contenders that a stopwatch is ready to time.

    Attributes:
        contenders: Their names.
        num_batches: How many batches each runs at a time.
    """

    contenders: list[str]
    num_batches: int


class Laps(NamedTuple):
    """Times of the contenders.

    Attributes:
        batch_ms: Milliseconds a batch of each round, by contender.
        num_batches: How many batches a round ran.
    """

    batch_ms: dict[str, list[float]]
    num_batches: int


class Stopwatch(Protocol):
    """Something whose contenders can be timed one at a time."""

    def prepare(self, batch_size: int) -> Prepared:
        """Make the contenders for a batch size."""
        ...

    def elapsed_ms(self, contender: str) -> float:
        """Run a contender once; milliseconds a batch."""
        ...


class LocalStopwatch:
    """Times contenders in this process."""

    def __init__(
        self,
        make_contenders: Callable[[int, int], Mapping[str, Callable[[], object]]],
        *,
        num_samples: int,
        synchronise: Callable[[], None] = lambda: None,
    ) -> None:
        self._make_contenders = make_contenders
        self._num_samples = num_samples
        self._synchronise = synchronise

    def prepare(self, batch_size: int) -> Prepared:
        """See :class:`Stopwatch`.

        As many batches as a round of the plain network has time for, of 64 samples at least; whole
        ones, so that a batch's time is that of full batches.
        """
        self._num_batches, self._contenders = 1, self._make_contenders(batch_size, 1)
        self.elapsed_ms("plain")
        fitting = min(int(1e3 * _ROUND_S / self.elapsed_ms("plain")), _MAX_BATCHES)
        least = -(-LEAST_SAMPLES // batch_size)
        self._num_batches = min(max(fitting, least), self._num_samples // batch_size)
        self._contenders = self._make_contenders(batch_size, self._num_batches)
        return Prepared(list(self._contenders), self._num_batches)

    def elapsed_ms(self, contender: str) -> float:
        """See :class:`Stopwatch`."""
        run = self._contenders[contender]
        self._synchronise()
        start = time.perf_counter()
        run()
        self._synchronise()
        return 1e3 * (time.perf_counter() - start) / self._num_batches


class ProcessStopwatch:
    """Times contenders in a process of their own, which :func:`serve` answers in."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = list(command)
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def prepare(self, batch_size: int) -> Prepared:
        """See :class:`Stopwatch`."""
        return Prepared(*self._ask({"prepare": batch_size}))

    def elapsed_ms(self, contender: str) -> float:
        """See :class:`Stopwatch`."""
        return float(self._ask({"run": contender}))

    def close(self) -> None:
        """End the process."""
        with self._process:
            self._process.kill()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: there is no answer to read
        answer = self._process.stdout.readline()
        if not answer:
            raise OfframpError(
                f"The process that times '{' '.join(self._command)}' has ended; what it said is "
                "above."
            )
        return json.loads(answer)


def serve(stopwatch: Stopwatch) -> None:
    """Answer a :class:`ProcessStopwatch` until it closes; what is printed goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        question = json.loads(line)
        if "prepare" in question:
            answer: Any = stopwatch.prepare(question["prepare"])
        else:
            answer = stopwatch.elapsed_ms(question["run"])
        print(json.dumps(answer), file=answers, flush=True)


def time_in_turn(
    stopwatches: Mapping[str, Stopwatch], batch_size: int, rounds: int, *, most_s: float = math.inf
) -> dict[str, Laps]:
    """Time every contender of every stopwatch, one after the other, round after round."""
    laps = {}
    for name, stopwatch in stopwatches.items():
        prepared = stopwatch.prepare(batch_size)
        laps[name] = Laps({one: [] for one in prepared.contenders}, prepared.num_batches)
    begun = time.perf_counter()
    _run_round(stopwatches, laps)
    round_s = time.perf_counter() - begun
    if round_s < _WARM_AFTER_S:
        for _ in range(_WARM_UP_ROUNDS - 1):
            _run_round(stopwatches, laps)
        for lap in laps.values():
            for batch_ms in lap.batch_ms.values():
                batch_ms.clear()
    if rounds * round_s > most_s:
        rounds = min(rounds, max(_LEAST_ROUNDS, int(most_s / round_s)))
    while any(len(ms) < rounds for lap in laps.values() for ms in lap.batch_ms.values()):
        _run_round(stopwatches, laps)
    return laps


def _run_round(stopwatches: Mapping[str, Stopwatch], laps: Mapping[str, Laps]) -> None:
    """Time every contender once more."""
    for name, stopwatch in stopwatches.items():
        for contender, batch_ms in laps[name].batch_ms.items():
            batch_ms.append(stopwatch.elapsed_ms(contender))
