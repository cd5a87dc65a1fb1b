"""What a call over a link takes where the link itself takes nothing: bytes and milliseconds."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.offload.cloud import cloud_models
from offramp.offload.codec import encode, find_codec
from offramp.offload.http_link import HttpLink
from offramp.offload.plan import CallCost, CutCost, LinkTerms, plan_split
from offramp.runtime.bundle import Bundle
from offramp.runtime.part import PartSession, carried_specs, cuts
from offramp.runtime.session import Session, check_inputs
from offramp.runtime.step_macs import StepMacs
from offramp.serving.server import Server, ServerConfig

Array = npt.NDArray[Any]

_NAME = "planned"
_TIMEOUT_S = 60.0
_SAMPLES = 64
"""Whose calls are measured for a plan."""
_WARM_UP = 3


def measure_calls(
    bundle: Bundle, inputs: Sequence[npt.ArrayLike], *, codec: str, threads: int | None = None
) -> list[CallCost]:
    """Send single samples to a server on this machine, at every cut.

    Args:
        bundle: The bundle.
        inputs: The network's inputs, each with the batch axis first; a few dozen samples. Those
            that reach a cut are sent there; where none does, a call is taken to be its features.
        codec: How features are written.
        threads: As for a session.
    Returns:
        One cost per cut but the last, from -1.
    """
    session = PartSession(bundle, threads=threads)
    costs = []
    with _serving(session) as port:
        for number, cut in enumerate(cuts(bundle)[:-1]):
            link = HttpLink(f"http://127.0.0.1:{port}", bundle, name=_NAME, split_after=cut)
            try:
                samples = _survivors(bundle, inputs, cut, threads)
                costs.append(_cost(bundle, session, number, cut, samples, link, codec))
            finally:
                link.close()
    return costs


def plan_bundle(
    bundle: Bundle,
    samples: Array,
    *,
    edge_ms: Sequence[float],
    cloud_ms: Sequence[float],
    link: LinkTerms,
    codec: str,
    threads: int | None = None,
) -> list[CutCost]:
    """Predict what every cut of a bundle costs, from samples: who leaves where, and what crosses.

    Args:
        bundle: The bundle.
        samples: Of the network's only input, shape (N, ...), like those to come.
        edge_ms: Milliseconds of each step on the edge, for a single sample.
        cloud_ms: The same in the cloud.
        link: What the link is like.
        codec: How features cross it.
        threads: As for a session.
    Returns:
        As :func:`~offramp.offload.plan.plan_split`.
    """
    exits = [step.exit_index for step in bundle.steps]
    left_by_N = Session(bundle, threads=threads).run(samples).exit_index
    return plan_split(
        exits=exits,
        edge_ms=edge_ms,
        cloud_ms=cloud_ms,
        leaving=[float((left_by_N == exit_index).mean()) for exit_index in exits],
        calls=measure_calls(bundle, [samples[:_SAMPLES]], codec=codec, threads=threads),
        link=link,
        codec=codec,
    )


def _cost(
    bundle: Bundle,
    session: PartSession,
    number: int,
    cut: int,
    samples: list[list[Array]],
    link: HttpLink,
    codec: str,
) -> CallCost:
    if not samples:
        payload = float(bundle.steps[number - 1].payload_bytes)
        return CallCost(call_bytes=payload, call_ms=0.0)
    step, found = bundle.steps[number], find_codec(codec)
    names = [spec.name for spec in carried_specs(bundle, number)]
    call_bytes, call_ms = [], []
    for carried in [samples[0]] * _WARM_UP + samples:
        marks = [time.perf_counter()]
        inputs = dict(zip(names, encode(carried, step, found), strict=True))
        reply = link.send(inputs, timeout_s=_TIMEOUT_S, compresses=found.compresses)
        marks.append(time.perf_counter())
        session.run(carried, starts_after=cut)
        marks.append(time.perf_counter())
        call_bytes.append(reply.sent_bytes + reply.received_bytes)
        call_ms.append(1e3 * (marks[1] - marks[0] - (marks[2] - marks[1])))
    return CallCost(
        call_bytes=fmean(call_bytes[_WARM_UP:]),
        call_ms=max(0.0, median(call_ms[_WARM_UP:])),
    )


def _survivors(
    bundle: Bundle, inputs: Sequence[npt.ArrayLike], cut: int, threads: int | None
) -> list[list[Array]]:
    """What crosses a cut, a sample at a time: unequal ones are then as long as they are."""
    arrays = [np.asarray(array) for array in inputs]
    local = PartSession(bundle, split_after=cut, threads=threads) if cut >= 0 else None
    macs, samples = StepMacs(bundle), []
    for row in range(len(arrays[0])):
        single = check_inputs(bundle, [array[row : row + 1] for array in arrays])
        carried, _ = macs.trim(single)
        if local is None:
            samples.append(carried)
            continue
        part = local.run(carried)
        if len(part.rows):
            samples.append(part.carried)
    return samples


@contextmanager
def _serving(session: PartSession) -> Iterator[int]:
    """A server on a thread of its own; yields its port."""
    server = Server(cloud_models(session, _NAME), ServerConfig(http_port=0, grpc_port=None))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="offramp-server", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result()
        yield server.http_port
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
