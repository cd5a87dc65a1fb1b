"""Engines timed against each other, each in a process of its own."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from offramp.errors import ArtifactError
from offramp.evaluation.bundle_contenders import all_steps_loop
from offramp.evaluation.stopwatch import ProcessStopwatch, Stopwatch
from offramp.evaluation.timing import (
    Spent,
    Timing,
    check_batch_sizes,
    hardware_name,
    time_engines,
)
from offramp.measure.agreement import (
    DECISION_TOLERANCE,
    SINGLE_SAMPLES,
    Reference,
    compare,
    is_near,
    require_agreement,
)
from offramp.measure.arrays import as_array
from offramp.policy.as_dict import policy_to_dict
from offramp.results import AdaptiveResult
from offramp.runtime import Bundle, Session, read_bundle
from offramp.runtime.hardware import processor_name

if TYPE_CHECKING:  # a bundle is timed without torch
    from torch import Tensor

    from offramp.families.family import TorchRunner

Array = npt.NDArray[Any]


def time_in_processes(
    runner: TorchRunner[Any, Any],
    inputs: Tensor,
    folders: Mapping[str, Path],
    *,
    batch_sizes: Sequence[int] = (1, 32, 256),
    rounds: int = 15,
    network: str | None = None,
) -> Timing:
    """Time engines on the CPU in turn, each in its own process.

    ``network`` is the FILE.py:function that builds that of a run, where no recipe does.
    Before the clock starts, every engine's answers are checked against choosing afterwards.
    """
    import torch

    from offramp.families import check_agreement

    check_batch_sizes(batch_sizes, num_samples=len(inputs))
    threads, result = torch.get_num_threads(), runner.run(inputs)
    check_agreement(result, runner, inputs)
    if "onnxruntime" in folders:
        _check_bundle(folders["onnxruntime"], runner, inputs)
    spent = Spent.of(result, runner.network.plain_macs(inputs))
    arrays = (inputs.numpy(),)
    with _stopwatches(folders, arrays, spent.shares, threads, network) as stopwatches:
        return time_engines(
            stopwatches,
            result,
            spent,
            num_exits=runner.network.num_exits,
            batch_sizes=batch_sizes,
            rounds=rounds,
            hardware=hardware_name(inputs.device),
            threads=threads,
        )


def time_bundle(
    session: Session,
    samples: Any,
    *,
    batch_sizes: Sequence[int] = (1, 32, 256),
    rounds: int = 15,
    threads: int | None = None,
) -> Timing:
    """Time a bundle alone, in a process of its own: for where the run it is of is not at hand.

    Before the clock starts, its answers are checked against its own steps, all run on every
    sample; not those of an int8 bundle, whose rounding depends on the batch.
    """
    inputs = tuple(map(as_array, samples if isinstance(samples, tuple) else (samples,)))
    check_batch_sizes(batch_sizes, num_samples=len(inputs[0]))
    bundle = session.bundle
    _require_plain(bundle)
    result = session.run(*inputs)
    if bundle.quantized is None:
        require_agreement(compare(result, _all_steps(session, *inputs)))
        few = tuple(array[:SINGLE_SAMPLES] for array in inputs)
        require_agreement(compare(_one_by_one(session, *few), _all_steps(session, *few)))
    spent = Spent.of(result, session.plain_macs(*inputs))
    threads = threads or _num_threads()
    folders = {"onnxruntime": bundle.folder}
    with _stopwatches(folders, inputs, spent.shares, threads) as stopwatches:
        return time_engines(
            stopwatches,
            result,
            spent,
            num_exits=bundle.num_exits,
            batch_sizes=batch_sizes,
            rounds=rounds,
            hardware=processor_name(),
            threads=threads,
        )


def _num_threads() -> int:
    """So many threads as torch takes: one a core, where nothing else is said."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else os.cpu_count() or 1


def _one_by_one(session: Session, *inputs: Array) -> AdaptiveResult[Array]:
    """Answer samples one at a time, which another file of a bundle does."""
    results = [
        session.run(*(array[row : row + 1] for array in inputs)) for row in range(len(inputs[0]))
    ]
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(result, name) for result in results])
        for name, part in vars(results[0]).items()
        if part is not None
    }
    return AdaptiveResult(**joined)


@contextmanager
def _stopwatches(
    folders: Mapping[str, Path],
    inputs: Sequence[Array],
    shares: Sequence[float],
    threads: int,
    network: str | None = None,
) -> Iterator[dict[str, Stopwatch]]:
    """A process for each engine, until the block ends."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        samples = [str(Path(scratch) / f"input_{number}.npy") for number in range(len(inputs))]
        of_plain = Path(scratch) / "shares.npy"
        for file, array in zip(samples, inputs, strict=True):
            np.save(file, array)
        np.save(of_plain, shares)
        stopwatches: dict[str, Stopwatch] = {}
        for backend, folder in folders.items():
            spec = {
                "backend": backend,
                "folder": str(folder),
                "network": network,
                "inputs": samples,
                "shares": str(of_plain),
                "threads": threads,
            }
            worker = [sys.executable, "-m", "offramp.evaluation.worker", json.dumps(spec)]
            stopwatches[backend] = stopwatch = ProcessStopwatch(worker)
            stack.callback(stopwatch.close)
        yield stopwatches


def _check_bundle(folder: Path, runner: TorchRunner[Any, Any], inputs: Tensor) -> None:
    from offramp.families import check_agreement
    from offramp.families.agreement import answer_in_batches

    bundle = read_bundle(folder)
    if bundle.policy != policy_to_dict(runner.policy):
        raise ArtifactError(
            f"The bundle {folder} holds another policy than the run: it was calibrated since. "
            "Export it again: offramp export RUN"
        )
    _require_plain(bundle)
    if bundle.quantized is None:
        session, few = Session(bundle), inputs[:SINGLE_SAMPLES]
        check_agreement(session.run(inputs), runner, inputs)
        check_agreement(answer_in_batches(session, few, batch_size=1), runner, few)


def _require_plain(bundle: Bundle) -> None:
    if bundle.plain_file is None:
        raise ArtifactError(
            f"The bundle {bundle.folder} holds no plain network to be timed against. "
            "Export it again with plain=True."
        )


def _all_steps(session: Session, *inputs: Array) -> Reference:
    """Run every step of a bundle on every sample, and choose afterwards."""
    bundle = session.bundle
    if bundle.skip is not None:
        return _every_block(session, bundle.skip.threshold, *inputs)
    if bundle.halting is not None:
        return _every_token(session, *inputs)
    output, step_B, confidences = all_steps_loop(session, *inputs)
    exit_index_B = np.array([step.exit_index for step in bundle.steps])[step_B]
    thresholds = [step.threshold for step in bundle.steps[:-1]]
    return Reference(
        output=output,
        exit_index=exit_index_B,
        num_exits=bundle.num_exits,
        work=exit_index_B[:, None],
        is_near=partial(is_near, np.stack(confidences), thresholds),
    )


def _every_block(session: Session, threshold: float, *inputs: Array) -> Reference:
    output, blocks_BG, probability_BG = session.run_every_block(*inputs)
    return _of_one_exit(
        output, blocks_BG, lambda: np.abs(probability_BG - threshold) < DECISION_TOLERANCE
    )


def _every_token(session: Session, *inputs: Array) -> Reference:
    output, tokens_BL, margin_BL = session.run_every_token(*inputs)
    # Rounding may decide in the layer before the ways part.
    return _of_one_exit(
        output,
        tokens_BL,
        lambda: np.pad(margin_BL < DECISION_TOLERANCE, ((0, 0), (1, 0)))[:, :-1],
    )


def _of_one_exit(output: Array, work: Array, is_near: Callable[[], Array]) -> Reference:
    first_B = np.zeros(len(output), dtype=np.int64)
    return Reference(output=output, exit_index=first_B, num_exits=1, work=work, is_near=is_near)
