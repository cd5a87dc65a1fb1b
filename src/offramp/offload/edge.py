"""The edge part: answers what it can, asks the part behind the link for the rest, waits for nobody.

Shapes: ``B`` batch, ``S`` samples that no exit here was sure of, ``C`` classes.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import (
    AuthenticationError,
    InvalidArgumentError,
    LinkTimeoutError,
    OffloadError,
    OfframpError,
    PayloadError,
)
from offramp.offload.answers import PartAnswer, as_answer, read_answer
from offramp.offload.breaker import CircuitBreaker
from offramp.offload.codec import check_scales, encode, find_codec
from offramp.offload.link import Link
from offramp.results import AdaptiveResult
from offramp.runtime.bundle import Bundle, read_bundle
from offramp.runtime.part import ALL_BEYOND, PartSession, carried_specs, first_step
from offramp.runtime.session import check_inputs
from offramp.runtime.step_macs import StepMacs

Array = npt.NDArray[Any]

_LOG = logging.getLogger(__name__)
LONGEST_MS = 1e9
"""Deadlines are below it."""
_MOST_ROWS = 256
_MOST_BYTES = 8 * 2**20
"""Of one call: half of what a server takes unless told."""
_BACKOFF_S = 0.02
"""Before a call is tried again, on average; drawn between half and one and a half of it."""


@dataclass(frozen=True, kw_only=True)
class EdgeConfig:
    """Settings for an edge part's use of its link.

    Attributes:
        codec: How features cross: float32, float16, int8 or int8+zstd.
        deadline_ms: Milliseconds after which a call is answered without the part behind the link.
        retries: Times that a call is tried again if it failed at once, as long as the deadline
            leaves what the last good call took.
        failures: Failures in a row that switch the link off.
        probe_s: Seconds between two looks at a link that is off.
    """

    codec: str = "float32"
    deadline_ms: float = 1000.0
    retries: int = 2
    failures: int = 3
    probe_s: float = 0.5

    def __post_init__(self) -> None:
        find_codec(self.codec)
        valid = {
            "deadline_ms": (0 < self.deadline_ms < LONGEST_MS, "above 0 and below 1e9"),
            "retries": (self.retries >= 0, "an int of at least 0"),
            "failures": (self.failures >= 1, "an int of at least 1"),
            "probe_s": (0 < self.probe_s < 1e6, "above 0 and below 1e6"),
        }
        for name, (is_valid, expected) in valid.items():
            if not is_valid:
                raise InvalidArgumentError(
                    f"The {name!r} parameter must be {expected}. Got {getattr(self, name)!r}."
                )


@dataclass(kw_only=True)
class Traffic:
    """Counts of what an edge part and its link did so far.

    Attributes:
        samples: Samples that were answered.
        offloaded: Of those, answered behind the link.
        fell_back: Of those, answered by an exit that was not sure, here or behind the link.
        calls: Times that the link was asked, retries counted.
        failed_calls: Of those, without a usable answer.
        sent_bytes: Bytes that went over the link in calls that were answered, headers included.
        received_bytes: Bytes that came back in them.
    """

    samples: int = 0
    offloaded: int = 0
    fell_back: int = 0
    calls: int = 0
    failed_calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


class EdgeRunner:
    """Runs the stages up to a cut, and leaves the samples that are still unsure to a link.

    A Runner. If the part behind the link is slow, wrong or gone, the answer is that of the deepest
    exit here, marked ``fell_back``; when it returns, it is asked again by itself. Several threads
    may call :meth:`run` at once.

    Args:
        bundle: A bundle's folder, or what :func:`~offramp.runtime.read_bundle` made of it; the part
            behind the link must have the same.
        split_after: The last stage that runs here; -1 sends everything on as it comes, and then
            nothing can be answered without the link.
        link: To the part behind it.
        starts_after: The stage before the first that runs here; -1 on the edge itself, more on a
            machine between the edge and the cloud.
        config: How to deal with the link.
        threads: Threads that compute within an operation; onnxruntime's choice if None.
    Attributes:
        traffic: What was answered where, and bytes.
        last_error: Why the link was of no use the last time; None if it never was.
    Raises:
        ArtifactError: If the bundle is damaged, or holds no scales for int8.
        InvalidArgumentError: If the bundle has no cut there, or all of it would run here.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        split_after: int,
        link: Link,
        starts_after: int = ALL_BEYOND,
        config: EdgeConfig = EdgeConfig(),
        threads: int | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        self.config = config
        self.traffic = Traffic()
        self.last_error: OfframpError | None = None
        self._codec = find_codec(config.codec)
        self._link = link
        self.starts_after = starts_after
        self._next = first_step(self.bundle, split_after, "split_after")
        if self._next == len(self.bundle.steps):
            raise InvalidArgumentError(
                f"The 'split_after' parameter must be below {split_after}: with all stages here "
                "there is nothing to link to. Use a Session."
            )
        if self._codec.dtype == "int8":
            check_scales(self.bundle.steps[self._next])
        self._local: PartSession | None = None
        if split_after > starts_after:
            self._local = PartSession(
                self.bundle, starts_after=starts_after, split_after=split_after, threads=threads
            )
        elif split_after < starts_after:
            raise InvalidArgumentError(
                f"The 'split_after' parameter must be at least {starts_after}, where this part "
                f"starts. Got {split_after}."
            )
        self._macs = StepMacs(self.bundle)
        self._lock = threading.Lock()
        self._usual_s = 0.0
        self._is_failing = False
        self._breaker = CircuitBreaker(
            lambda: link.check(timeout_s=config.deadline_ms / 1e3),
            failures=config.failures,
            probe_s=config.probe_s,
        )

    def run(
        self, *inputs: npt.ArrayLike, deadline_ms: float | None = None
    ) -> AdaptiveResult[Array]:
        """Answer a batch.

        Args:
            inputs: The network's inputs, each with the batch axis first.
            deadline_ms: Milliseconds after which it is answered with what there is; as configured
                if None.
        Returns:
            Logits, exit, confidence and MACs of each sample, all machines counted; how many links
            away it was answered, and whether an exit answered that was not sure.
        Raises:
            ShapeError: If the inputs are not of the shape that the bundle was exported for.
            OffloadError: If nothing runs here and the link is of no use.
        """
        started = time.perf_counter()
        carried, measured = self._macs.trim(check_inputs(self.bundle, inputs))
        answer = self.answer(carried, deadline_ms=deadline_ms, started=started)
        return AdaptiveResult(
            output=answer.output,
            exit_index=answer.exit_index,
            confidence=answer.confidence,
            macs=self._macs.of_exits(answer.exit_index, measured),
            answered_by=answer.answered_by,
            fell_back=answer.fell_back,
        )

    def answer(
        self,
        carried: list[Array],
        *,
        deadline_ms: float | None = None,
        started: float | None = None,
    ) -> PartAnswer:
        """Answer a batch of what this part is given, wherever it starts.

        Args:
            carried: Features and state, each with the batch axis first.
            deadline_ms: As for :meth:`run`.
            started: When the call began, by ``time.perf_counter``; now if None.
        Returns:
            The answers.
        """
        limit_ms = self.config.deadline_ms if deadline_ms is None else deadline_ms
        if not 0 < limit_ms < LONGEST_MS:
            raise InvalidArgumentError(
                f"The 'deadline_ms' parameter must be above 0 and below {LONGEST_MS:g}. "
                f"Got {limit_ms}."
            )
        end = (time.perf_counter() if started is None else started) + limit_ms / 1e3
        if self._local is None:
            answer = self._pass_on(carried, end)
            self._count(answer, offloaded=len(answer.output))
            return answer
        part = self._local.run(carried)
        answer = as_answer(part)
        answer.fell_back[part.rows] = True  # until somebody behind the link knows better
        offloaded = 0
        for chosen in self._chunks(part.carried, len(part.rows)):
            try:
                chunk = [tensor[chosen] for tensor in part.carried]
                behind, is_sound_S = self._ask(chunk, end, answer.output.shape[1:])
            except OfframpError:
                break  # the next would fare no better
            except Exception:  # whatever goes wrong with the link, there is an answer
                _LOG.exception("asking over the link failed in a way that it should not")
                break
            _overwrite(answer, part.rows[chosen[is_sound_S]], behind, is_sound_S)
            offloaded += int(is_sound_S.sum())
        self._count(answer, offloaded=offloaded)
        return answer

    def _pass_on(self, carried: list[Array], end: float) -> PartAnswer:
        """Ask for all samples, where nothing runs here that could answer instead."""
        parts = []
        for chosen in self._chunks(carried, len(carried[0])):
            try:
                behind, is_sound_S = self._ask([t[chosen] for t in carried], end, None)
            except OffloadError:
                raise
            except OfframpError as error:  # the other part's fault, not our caller's
                raise OffloadError(str(error)) from error
            if not is_sound_S.all():
                raise OffloadError("The part behind the link answered what cannot be.")
            parts.append(behind)
        names = [field.name for field in fields(PartAnswer)]
        if sum(len(part.output) for part in parts) < len(carried[0]):
            raise PayloadError("Expected finite features. Got NaN or infinity.")
        return PartAnswer(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        )

    def _chunks(self, carried: list[Array], count: int) -> list[Array]:
        """Rows to send together: none that a server would refuse, nor more than it takes."""
        if count == 0:
            return []
        is_finite_S = np.ones(count, dtype=np.bool_)
        for tensor in carried:
            if tensor.dtype.kind == "f":
                is_finite_S &= np.isfinite(tensor).reshape(count, -1).all(1)
        rows = np.flatnonzero(is_finite_S)
        row_bytes = max(1, sum(tensor.nbytes for tensor in carried) // count)
        size = max(1, min(_MOST_ROWS, _MOST_BYTES // row_bytes))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """Shape of a sample's logits; None for axes that are as long as the image's.

        Raises:
            InvalidArgumentError: If nothing runs here, so that it is not known.
        """
        if self._local is None:
            raise InvalidArgumentError("A part that only passes samples on does not know logits.")
        return self._local.output_shape

    def close(self) -> None:
        """Stop looking for the other part, and let go of the link."""
        self._breaker.close()
        self._link.close()

    def _ask(
        self, carried: list[Array], end: float, logits_shape: tuple[int, ...] | None
    ) -> tuple[PartAnswer, Array]:
        """Ask the part behind the link, more than once if there is time."""
        step = self.bundle.steps[self._next]
        if self._breaker.is_open:
            raise OffloadError(f"The link is off since it failed: {self.last_error}")
        encoded = encode(carried, step, self._codec)
        names = [spec.name for spec in carried_specs(self.bundle, self._next)]
        inputs = dict(zip(names, encoded, strict=True))
        for left in reversed(range(self.config.retries + 1)):
            if time.perf_counter() >= end:
                raise LinkTimeoutError("The deadline was over before the link was asked.")
            try:
                answer = self._call(inputs, end, logits_shape)
            except OfframpError as error:
                pause_s = _BACKOFF_S * random.uniform(0.5, 1.5)
                # Tried again only if it can still make it.
                in_time = time.perf_counter() + pause_s + self._usual_s < end
                is_last = not left or not in_time or not _may_pass(error)
                self._failed(error, counts=is_last)
                if is_last:
                    raise
                time.sleep(pause_s)
            else:
                self._breaker.succeeded()
                return answer
        raise AssertionError("the last attempt returns or raises")

    def _call(
        self, inputs: Mapping[str, Array], end: float, logits_shape: tuple[int, ...] | None
    ) -> tuple[PartAnswer, Array]:
        started = time.perf_counter()
        reply = self._link.send(inputs, timeout_s=end - started, compresses=self._codec.compresses)
        rows = len(next(iter(inputs.values())))
        exits = [step.exit_index for step in self.bundle.steps[self._next :]]
        answer = read_answer(reply.outputs, exits=exits, rows=rows, logits_shape=logits_shape)
        with self._lock:
            if self._is_failing:
                _LOG.warning("the link is back")
            self._is_failing = False
            self._usual_s = time.perf_counter() - started
            self.traffic.calls += 1
            self.traffic.sent_bytes += reply.sent_bytes
            self.traffic.received_bytes += reply.received_bytes
        return answer

    def _failed(self, error: OfframpError, *, counts: bool) -> None:
        """Note a failure; the breaker counts the calls that were given up, not the attempts."""
        with self._lock:
            if not self._is_failing:
                _LOG.warning("the link is of no use now: %s", error)
            self._is_failing = True
            self.last_error = error
            self.traffic.calls += 1
            self.traffic.failed_calls += 1
        if counts:
            self._breaker.failed()

    def _count(self, answer: PartAnswer, *, offloaded: int) -> None:
        with self._lock:
            self.traffic.samples += len(answer.output)
            self.traffic.offloaded += offloaded
            self.traffic.fell_back += int(answer.fell_back.sum())


def _may_pass(error: OfframpError) -> bool:
    """Tell if the same call may go well a moment later."""
    return isinstance(error, OffloadError) and not isinstance(
        error, (LinkTimeoutError, AuthenticationError)
    )


def _overwrite(answer: PartAnswer, rows: Array, behind: PartAnswer, is_sound_S: Array) -> None:
    """Put in the answers of the part behind the link that can be."""
    for field in fields(PartAnswer):
        getattr(answer, field.name)[rows] = getattr(behind, field.name)[is_sound_S]
