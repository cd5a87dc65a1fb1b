"""Batches out of the requests that wait: one queue and one worker thread a model.

Shapes: ``B`` batch.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument as ValueRefused

from offramp.errors import LinkTimeoutError, OfframpError, PayloadError, ServerBusyError
from offramp.serving.metrics import Metrics
from offramp.serving.served import ServedModel

Array = npt.NDArray[Any]
Answers = Mapping[str, Array]

_LEAST_MS = 1e-3
"""Of a deadline that is over: there is still an answer to give."""
_log = logging.getLogger(__name__)


class ModelFailedError(OfframpError):
    """The model raised something, or gave an answer of another length; the log says what."""


@dataclass(eq=False, kw_only=True)
class _Waiting:
    """A request in the queue.

    ``kind`` is the same for requests that may share a batch. ``timer`` ends the wait at its
    deadline, which is ``end`` by the loop's clock.
    """

    arrays: list[Array]
    rows: int
    kind: tuple[object, ...]
    answer: asyncio.Future[Answers]
    timer: asyncio.TimerHandle | None = None
    end: float = math.inf


class Batcher:
    """Answers requests for one model, several at a time where several wait.

    A request that comes when nothing runs starts at once. While a batch runs, others gather, and
    are the next one. Only after a batch of several requests is it likely that more are on their way
    at the same time; then the next waits for them, ``max_delay_ms`` at the most, and no longer than
    until as many have come.

    Make it in a running event loop.
    """

    def __init__(
        self,
        model: ServedModel,
        metrics: Metrics,
        *,
        max_batch_rows: int,
        max_queue_rows: int,
        max_delay_ms: float,
    ) -> None:
        self._model, self._metrics = model, metrics
        self._max_batch_rows, self._max_queue_rows = max_batch_rows, max_queue_rows
        self._max_delay_s = max_delay_ms / 1e3
        self._queue: dict[_Waiting, None] = {}  # a queue that any place can leave at once
        self._queued_rows = 0
        self._changed = asyncio.Event()
        self._expected_requests = 1
        self._is_open = True
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"offramp-{model.name}")
        self._worker = asyncio.get_running_loop().create_task(self._work())

    async def answer(self, arrays: list[Array], deadline_ms: float | None = None) -> Answers:
        """Wait for a place in a batch, and for its answer.

        Cancelling the call takes the request out of the queue.
        """
        rows = len(arrays[0])
        self._check_room(rows)
        loop = asyncio.get_running_loop()
        waiting = _Waiting(
            arrays=arrays,
            rows=rows,
            kind=tuple((array.dtype, array.shape[1:]) for array in arrays),
            answer=loop.create_future(),
        )
        if deadline_ms is not None:
            waiting.end = loop.time() + deadline_ms / 1e3
            waiting.timer = loop.call_at(waiting.end, self._expire, waiting, deadline_ms)
        self._queue[waiting] = None
        self._count(rows)
        try:
            return await waiting.answer
        finally:  # answered, expired, or given up by the client
            self._leave(waiting)

    async def close(self, grace_s: float) -> None:
        """Take nothing more, answer what waits, and stop."""
        self._is_open = False
        self._changed.set()
        await asyncio.wait([self._worker], timeout=grace_s)
        for waiting in list(self._queue):
            self._refuse(waiting, _going_away())
        self._worker.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _check_room(self, rows: int) -> None:
        if rows > self._max_batch_rows:
            raise PayloadError(
                f"A request may have at most {self._max_batch_rows} samples. Got {rows}. "
                "Send them in parts."
            )
        if not self._is_open:
            raise _going_away()
        if self._queued_rows + rows > self._max_queue_rows:
            raise ServerBusyError(
                f"{self._queued_rows} samples wait already, of {self._max_queue_rows} that may. "
                "Try again later."
            )

    def _count(self, rows: int) -> None:
        self._queued_rows += rows
        self._metrics.set_queue(self._model.name, self._queued_rows)
        self._changed.set()

    def _leave(self, waiting: _Waiting) -> None:
        """Take a request out of the queue, if it is still there."""
        if waiting in self._queue:
            del self._queue[waiting]
            self._count(-waiting.rows)
        if waiting.timer is not None:
            waiting.timer.cancel()

    def _expire(self, waiting: _Waiting, deadline_ms: float) -> None:
        self._refuse(
            waiting,
            LinkTimeoutError(
                f"The request waited longer than its deadline_ms of {deadline_ms:g} and was not "
                "computed. Try again later, or allow more."
            ),
        )

    def _refuse(self, waiting: _Waiting, error: OfframpError) -> None:
        self._leave(waiting)
        if not waiting.answer.done():
            waiting.answer.set_exception(error)

    async def _work(self) -> None:
        """Answer batch after batch, until the queue is closed and empty."""
        while self._queue or self._is_open:
            await self._wait_for_requests()
            batch = self._take()
            if batch:
                self._expected_requests = len(batch)
                await self._answer_batch(batch)

    async def _wait_for_requests(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._queue and self._is_open:
            self._changed.clear()
            await self._changed.wait()
        end = loop.time() + self._max_delay_s
        while self._is_open and len(self._queue) < self._expected_requests:
            if self._queued_rows >= self._max_batch_rows or loop.time() >= end:
                break
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), end - loop.time())
            except asyncio.TimeoutError:
                break

    def _take(self) -> list[_Waiting]:
        """The oldest request, and those behind it that may share its batch."""
        batch: list[_Waiting] = []
        room = self._max_batch_rows
        for waiting in self._queue:
            if waiting.rows <= room and (not batch or waiting.kind == batch[0].kind):
                batch.append(waiting)
                room -= waiting.rows
            if room == 0:
                break
        for waiting in batch:
            self._leave(waiting)
        return batch

    async def _answer_batch(self, batch: list[_Waiting]) -> None:
        end = min(waiting.end for waiting in batch)
        outcome = await self._compute([waiting.arrays for waiting in batch], end)
        if isinstance(outcome, Exception) and len(batch) > 1:
            # One request may be to blame; its neighbours shall not suffer.
            for waiting in batch:
                if not waiting.answer.done():
                    await self._answer_batch([waiting])
            return
        start = 0
        for waiting in batch:
            rows = slice(start, start + waiting.rows)
            start += waiting.rows
            if waiting.answer.done():  # the client has gone
                continue
            if isinstance(outcome, Exception):
                waiting.answer.set_exception(outcome)
            else:
                waiting.answer.set_result({name: value[rows] for name, value in outcome.items()})

    async def _compute(self, parts: list[list[Array]], end: float) -> Answers | Exception:
        """Run the model in its thread, by some time; what it raises is returned."""
        loop = asyncio.get_running_loop()
        left_ms = 1e3 * (end - loop.time())
        deadline_ms = None if math.isinf(end) else max(_LEAST_MS, left_ms)
        try:
            answers = await loop.run_in_executor(
                self._thread, _run, self._model, parts, deadline_ms
            )
        except OfframpError as error:
            return error
        except ValueRefused as error:  # a token that the vocabulary does not have, for example
            why = str(error).rpartition("Status Message: ")[2]
            return PayloadError(f"The model {self._model.name} cannot take these values: {why}")
        except Exception as error:
            _log.exception("model %s failed", self._model.name)
            return ModelFailedError(f"{type(error).__name__} in the model {self._model.name}")
        rows = sum(len(arrays[0]) for arrays in parts)
        self._metrics.count_batch(self._model.name, rows, answers.get("exit_index"))
        return answers


def _run(model: ServedModel, parts: Sequence[list[Array]], deadline_ms: float | None) -> Answers:
    joined = [
        np.concatenate(column) if len(column) > 1 else column[0]
        for column in zip(*parts, strict=True)
    ]
    answers = model.run(joined, deadline_ms=deadline_ms)
    rows = len(joined[0])
    wrong = [name for name, value in answers.items() if value.ndim == 0 or len(value) != rows]
    if wrong:
        raise ValueError(f"outputs {', '.join(wrong)} do not have {rows} rows")
    return answers


def _going_away() -> ServerBusyError:
    return ServerBusyError("The server is shutting down and takes no more work.")
