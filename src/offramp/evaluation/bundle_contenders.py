"""Contenders that are timed for bundles; the names are those of ``contenders.py``. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.runtime import Bundle, PlainSession, Session, with_routing_threshold, with_thresholds

Array = npt.NDArray[Any]


def all_steps_loop(session: Session, *inputs: Array) -> tuple[Array, Array, list[Array]]:
    """Run every step on every sample, then choose: output, step_B, and each step's confidences."""
    carried = list(inputs)
    outputs, leaves, confidences = [], [], []
    for index in range(len(session.bundle.steps)):
        _, (output, confidence_B, leave_B, *carried) = session.run_step(index, carried)
        outputs.append(output)
        leaves.append(leave_B)
        confidences.append(confidence_B)
    chosen_B = np.argmax(np.stack(leaves), axis=0)
    return np.stack(outputs)[chosen_B, np.arange(len(inputs[0]))], chosen_B, confidences


def _asking_all(bundle: Bundle) -> Bundle:
    return with_thresholds(bundle, [float("inf")] * (len(bundle.steps) - 1))


_WHOLE: dict[str, tuple[Callable[..., object], Callable[[Bundle], Bundle]]] = {
    "exits": (all_steps_loop, _asking_all),
    "skip": (Session.run_every_block, partial(with_routing_threshold, threshold=0.0)),
    "halting": (Session.run_every_token, partial(with_routing_threshold, threshold=1.0)),
}
"""By family: everything, then choosing; and the bundle that asks as often and saves nothing."""


def bundle_contenders(
    session: Session, batches: Sequence[Sequence[Array]], *, threads: int | None = None
) -> Mapping[str, Callable[[], object]]:
    """The contenders that onnxruntime runs; exits that are off have no step and no part in any."""
    bundle = session.bundle
    run_all, asking_all = _WHOLE[bundle.family]
    plain = PlainSession(bundle, threads=threads)
    never = Session(asking_all(bundle), threads=threads)
    contenders: dict[str, Callable[[], object]] = {
        "plain": lambda: [plain.run(*batch) for batch in batches],
        "all_exits": lambda: [run_all(session, *batch) for batch in batches],
        "adaptive": lambda: [session.run(*batch) for batch in batches],
        "never_exit": lambda: [never.run(*batch) for batch in batches],
    }
    if bundle.steps:
        survivors = [_carried_to_survivors(session, batch) for batch in batches]
        everyone = [_carried_to_survivors(never, batch) for batch in batches]
        steps = [step for given in survivors for step in given]
        contenders["stages"] = partial(_run_steps, session, steps)
        for k in range(len(bundle.steps)):
            each = [given[k] for given in everyone]
            contenders[f"stage_{k}"] = partial(_run_steps, session, each)
    return contenders


def _carried_to_survivors(
    session: Session, batch: Sequence[Array]
) -> list[tuple[int, list[Array]]]:
    """Collect the inputs of each step that runs, when the batch runs early."""
    carried = list(batch)
    given = []
    for index in range(len(session.bundle.steps)):
        given.append((index, carried))
        _, (_, _, leave_B, *carried) = session.run_step(index, carried)
        if leave_B.all():
            break
        carried = [tensor[~leave_B] for tensor in carried]
    return given


def _run_steps(session: Session, steps: Sequence[tuple[int, list[Array]]]) -> None:
    """Steps alone. Nothing is kept, as a session keeps nothing: see ``contenders.py``."""
    for index, carried in steps:
        session.run_step(index, carried)
