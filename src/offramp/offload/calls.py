"""Costs of a call over a link that itself takes nothing: bytes and milliseconds."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import OffloadError
from offramp.offload.codec import encode, find_codec
from offramp.offload.http_link import HttpLink
from offramp.offload.plan import CallCost, CutCost, LinkTerms, plan_split
from offramp.runtime.bundle import Bundle
from offramp.runtime.part import PartSession, carried_specs, cuts
from offramp.runtime.session import Session, check_inputs
from offramp.runtime.step_macs import StepMacs

Array = npt.NDArray[Any]

_NAME = "planned"
_TIMEOUT_S = 60.0
_SAMPLES = 32
"""Whose calls are measured for a plan."""
_WARM_UP = 3
_LONGEST_PAUSE_MS = 100.0
"""Between calls: a plan shall not take minutes."""


def measure_calls(
    bundle: Bundle,
    inputs: Sequence[npt.ArrayLike],
    *,
    codec: str,
    pauses_ms: Sequence[float],
    threads: int | None = None,
) -> list[CallCost]:
    """Send single samples to a server on this machine, at every cut."""
    session = PartSession(bundle, threads=threads)
    costs = []
    with _serving(bundle, threads) as port:
        for number, cut in enumerate(cuts(bundle)[:-1]):
            link = HttpLink(f"http://127.0.0.1:{port}", bundle, name=_NAME, split_after=cut)
            try:
                samples = _survivors(bundle, inputs, cut, threads)
                pause_s = min(pauses_ms[number], _LONGEST_PAUSE_MS) / 1e3
                costs.append(_cost(bundle, session, number, samples, link, codec, pause_s))
            finally:
                link.close()
    return costs


def plan_bundle(
    bundle: Bundle,
    samples: Sequence[Array],
    *,
    edge_ms: Sequence[float],
    cloud_ms: Sequence[float],
    link: LinkTerms,
    codec: str,
    threads: int | None = None,
) -> list[CutCost]:
    """Predict from samples what each cut of a bundle costs: who leaves where, what crosses."""
    exits = [step.exit_index for step in bundle.steps]
    # Samples come one after the other: between two calls a device computes and the link carries.
    pauses_ms = [sum(edge_ms[:number]) + link.rtt_ms for number in range(len(exits))]
    left_by_N = Session(bundle, threads=threads).run(*samples).exit_index
    return plan_split(
        exits=exits,
        edge_ms=edge_ms,
        cloud_ms=cloud_ms,
        leaving=[float((left_by_N == exit_index).mean()) for exit_index in exits],
        calls=measure_calls(
            bundle,
            [tensor[:_SAMPLES] for tensor in samples],
            codec=codec,
            pauses_ms=pauses_ms,
            threads=threads,
        ),
        link=link,
        codec=codec,
    )


def _cost(
    bundle: Bundle,
    session: PartSession,
    number: int,
    samples: list[list[Array]],
    link: HttpLink,
    codec: str,
    pause_s: float,
) -> CallCost:
    if not samples:
        payload = float(bundle.steps[number - 1].payload_bytes)
        return CallCost(call_bytes=payload, call_ms=0.0)
    step, found = bundle.steps[number], find_codec(codec)
    cut = cuts(bundle)[number]
    names = [spec.name for spec in carried_specs(bundle, number)]
    call_bytes, call_ms = [], []
    for carried in [samples[0]] * _WARM_UP + samples:
        time.sleep(pause_s)
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
        call_ms=max(0.0, fmean(call_ms[_WARM_UP:])),
    )


def _survivors(
    bundle: Bundle, inputs: Sequence[npt.ArrayLike], cut: int, threads: int | None
) -> list[list[Array]]:
    """Compute what crosses a cut, a sample at a time: each is then as long as it is."""
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
def _serving(bundle: Bundle, threads: int | None) -> Iterator[int]:
    """A cloud as a process of its own, as in use; yields its port."""
    command = [sys.executable, "-m", "offramp", "cloud", str(bundle.folder)]
    command += ["--name", _NAME, "--http-port", "0", "--grpc-port", "-1"]
    if threads is not None:
        command += ["--threads", str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline() if process.stdout is not None else ""
            port = re.search(r"127\.0\.0\.1:(\d+)", said)
            if port is None:
                raise OffloadError(
                    f"The server that a plan is measured with did not start: {' '.join(command)}"
                )
            yield int(port[1])
        finally:
            process.terminate()
