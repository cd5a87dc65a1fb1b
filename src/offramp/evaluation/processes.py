"""Engines timed against each other, each in a process of its own."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from offramp.families import check_agreement
from offramp.families.agreement import (
    DECISION_TOLERANCE,
    SINGLE_SAMPLES,
    Reference,
    answer_in_batches,
    compare,
    require_agreement,
)
from offramp.families.exits import is_near
from offramp.families.family import TorchRunner
from offramp.families.halting import token_reference
from offramp.model.multi_exit import Features, as_features
from offramp.policy.as_dict import policy_to_dict
from offramp.runtime import Bundle, Session, read_bundle


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
    check_batch_sizes(batch_sizes, num_samples=len(inputs))
    result = runner.run(inputs)
    check_agreement(result, runner, inputs)
    if "onnxruntime" in folders:
        _check_bundle(folders["onnxruntime"], runner, inputs)
    spent = Spent.of(result, runner.network.plain_macs(inputs))
    with _stopwatches(folders, (inputs,), spent.shares, network) as stopwatches:
        return time_engines(
            stopwatches,
            result,
            spent,
            num_exits=runner.network.num_exits,
            batch_sizes=batch_sizes,
            rounds=rounds,
            hardware=hardware_name(inputs.device),
        )


def time_bundle(
    session: Session,
    samples: Tensor | Features,
    *,
    batch_sizes: Sequence[int] = (1, 32, 256),
    rounds: int = 15,
) -> Timing:
    """Time a bundle alone, in a process of its own: for where the run it is of is not at hand.

    Before the clock starts, its answers are checked against its own steps, all run on every
    sample; not those of an int8 bundle, whose rounding depends on the batch.
    """
    inputs = as_features(samples)
    check_batch_sizes(batch_sizes, num_samples=len(inputs[0]))
    bundle = session.bundle
    _require_plain(bundle)
    result = session.run(*inputs)
    if bundle.quantized is None:
        require_agreement(compare(result, _all_steps(session, *inputs)))
        few = tuple(tensor[:SINGLE_SAMPLES] for tensor in inputs)
        ones = answer_in_batches(session, few, batch_size=1)
        require_agreement(compare(ones, _all_steps(session, *few)))
    spent = Spent.of(result, session.plain_macs(*inputs))
    with _stopwatches({"onnxruntime": bundle.folder}, inputs, spent.shares) as stopwatches:
        return time_engines(
            stopwatches,
            result,
            spent,
            num_exits=bundle.num_exits,
            batch_sizes=batch_sizes,
            rounds=rounds,
            hardware=hardware_name(inputs[0].device),
        )


@contextmanager
def _stopwatches(
    folders: Mapping[str, Path],
    inputs: Features,
    shares: Sequence[float],
    network: str | None = None,
) -> Iterator[dict[str, Stopwatch]]:
    """A process for each engine, until the block ends."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        samples = [str(Path(scratch) / f"input_{number}.npy") for number in range(len(inputs))]
        of_plain = Path(scratch) / "shares.npy"
        for file, tensor in zip(samples, inputs, strict=True):
            np.save(file, tensor.numpy())
        np.save(of_plain, shares)
        stopwatches: dict[str, Stopwatch] = {}
        for backend, folder in folders.items():
            spec = {
                "backend": backend,
                "folder": str(folder),
                "network": network,
                "inputs": samples,
                "shares": str(of_plain),
                "threads": torch.get_num_threads(),
            }
            worker = [sys.executable, "-m", "offramp.evaluation.worker", json.dumps(spec)]
            stopwatches[backend] = stopwatch = ProcessStopwatch(worker)
            stack.callback(stopwatch.close)
        yield stopwatches


def _check_bundle(folder: Path, runner: TorchRunner[Any, Any], inputs: Tensor) -> None:
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


def _all_steps(session: Session, *inputs: Tensor) -> Reference:
    """Run every step of a bundle on every sample, and choose afterwards."""
    if session.bundle.skip is not None:
        return _every_block(session, inputs[0], session.bundle.skip.threshold)
    if session.bundle.halting is not None:
        masked, tokens_BL, margin_BL = map(torch.from_numpy, session.run_every_token(*inputs))
        return token_reference(masked, tokens_BL, lambda: margin_BL < DECISION_TOLERANCE)
    steps = session.bundle.steps
    output, step_B, confidences = all_steps_loop(session, *(tensor.numpy() for tensor in inputs))
    exit_index_B = torch.tensor([step.exit_index for step in steps])[step_B]
    confidence_KB = torch.from_numpy(np.stack(confidences))
    return Reference(
        output=torch.from_numpy(output),
        exit_index=exit_index_B,
        num_exits=session.bundle.num_exits,
        work=exit_index_B[:, None],
        is_near=partial(is_near, confidence_KB, [step.threshold for step in steps[:-1]]),
    )


def _every_block(session: Session, inputs: Tensor, threshold: float) -> Reference:
    output, blocks_BG, probability_BG = map(torch.from_numpy, session.run_every_block(inputs))
    return Reference(
        output=output,
        exit_index=torch.zeros(len(output), dtype=torch.int64),
        num_exits=1,
        work=blocks_BG,
        is_near=lambda: (probability_BG - threshold).abs() < DECISION_TOLERANCE,
    )
