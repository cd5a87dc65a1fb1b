"""What is timed against what, for bundles; the names are those of ``contenders.py``. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.runtime import PlainSession, Session, with_routing_threshold, with_thresholds

Array = npt.NDArray[Any]


def bundle_contenders(
    session: Session, batches: Sequence[Array], *, threads: int | None = None
) -> Mapping[str, Callable[[], object]]:
    """The contenders that onnxruntime runs.

    Args:
        session: Runs the bundle, which must hold the plain network.
        batches: Real samples.
        threads: Threads of the other sessions that are made.
    Returns:
        Contenders by name; exits that are off have no step and so no part in any.
    """
    if session.bundle.skip is not None:
        return _skip_contenders(session, batches, threads=threads)
    if session.bundle.halting is not None:
        return _halting_contenders(session, batches, threads=threads)
    bundle, steps = session.bundle, range(len(session.bundle.steps))
    plain = PlainSession(bundle, threads=threads)
    nobody = with_thresholds(bundle, [float("inf")] * (len(steps) - 1))
    never = Session(nobody, threads=threads)
    survivors = [_carried_to_survivors(session, batch) for batch in batches]
    everyone = [_carried_to_survivors(never, batch) for batch in batches]
    contenders: dict[str, Callable[[], object]] = {
        "plain": lambda: [plain.run(batch) for batch in batches],
        "all_exits": lambda: [all_steps_loop(session, batch) for batch in batches],
        "adaptive": lambda: [session.run(batch) for batch in batches],
        "never_exit": lambda: [never.run(batch) for batch in batches],
        "stages": partial(_run_steps, session, [step for given in survivors for step in given]),
    }
    for k in steps:
        contenders[f"stage_{k}"] = partial(_run_steps, session, [given[k] for given in everyone])
    return contenders


def _skip_contenders(
    session: Session, batches: Sequence[Array], *, threads: int | None
) -> Mapping[str, Callable[[], object]]:
    plain = PlainSession(session.bundle, threads=threads)
    nothing_skipped = Session(with_routing_threshold(session.bundle, 0.0), threads=threads)
    return {
        "plain": lambda: [plain.run(batch) for batch in batches],
        "all_exits": lambda: [session.run_every_block(batch) for batch in batches],
        "adaptive": lambda: [session.run(batch) for batch in batches],
        "never_exit": lambda: [nothing_skipped.run(batch) for batch in batches],
    }


def _halting_contenders(
    session: Session, batches: Sequence[Array], *, threads: int | None
) -> Mapping[str, Callable[[], object]]:
    plain = PlainSession(session.bundle, threads=threads)
    longest = Session(with_routing_threshold(session.bundle, 1.0), threads=threads)
    return {
        "plain": lambda: [plain.run(batch) for batch in batches],
        "all_exits": lambda: [session.run_every_token(batch) for batch in batches],
        "adaptive": lambda: [session.run(batch) for batch in batches],
        "never_exit": lambda: [longest.run(batch) for batch in batches],
    }


def _carried_to_survivors(session: Session, batch: Array) -> list[tuple[int, list[Array]]]:
    """What each step that runs is given, when the batch runs early."""
    carried = [batch]
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


def all_steps_loop(session: Session, batch: Array) -> tuple[Array, Array, list[Array]]:
    """Run every step on every sample, then choose: the all-exits loop of a bundle.

    Args:
        session: Runs the bundle.
        batch: Samples, shape (B, ...), of the bundle's type.
    Returns:
        output: Logits of the chosen steps, shape (B, C).
        step: The first step whose exit each sample may leave by, shape (B,).
        confidences: Of every step, each of shape (B,).
    """
    carried = [batch]
    outputs, leaves, confidences = [], [], []
    for index in range(len(session.bundle.steps)):
        _, (output, confidence_B, leave_B, *carried) = session.run_step(index, carried)
        outputs.append(output)
        leaves.append(leave_B)
        confidences.append(confidence_B)
    chosen_B = np.argmax(np.stack(leaves), axis=0)
    return np.stack(outputs)[chosen_B, np.arange(len(batch))], chosen_B, confidences
