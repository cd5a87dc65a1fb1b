"""Engines timed against each other, each in a process of its own."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offramp.errors import ArtifactError
from offramp.inference.agreement import check_early_answers
from offramp.inference.runner import AdaptiveRunner
from offramp.inference.stopwatch import ProcessStopwatch
from offramp.inference.timing import Timing, check_batch_sizes, hardware_name, time_engines
from offramp.policy.policies import policy_to_dict
from offramp.runtime import Session, read_bundle


def time_in_processes(
    runner: AdaptiveRunner,
    inputs: Tensor,
    folders: Mapping[str, Path],
    *,
    batch_sizes: Sequence[int] = (1, 32, 256),
    rounds: int = 15,
) -> Timing:
    """Time engines on the CPU in turn, each in its own process.

    Before the clock starts, every engine's answers are checked against the all-exits loop.

    Args:
        runner: Holds the run's network and policy, on the CPU.
        inputs: Real samples, shape (N, ...).
        folders: By engine: the run folder for torch, a bundle of it for onnxruntime.
        batch_sizes: Samples a batch; each at most N.
        rounds: How often every contender runs all batches.
    Returns:
        Medians per batch and engine.
    Raises:
        ArtifactError: If the bundle cannot be read, or holds another policy than the run.
        InvalidArgumentError: If a batch size is below 1 or above N, or there are no rounds.
        OfframpError: If leaving early gives other answers than choosing afterwards.
    """
    check_batch_sizes(batch_sizes, num_samples=len(inputs))
    result = runner.run(inputs)
    check_early_answers(result, runner, inputs)
    if "onnxruntime" in folders:
        _check_bundle(folders["onnxruntime"], runner, inputs)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        samples = Path(scratch) / "inputs.npy"
        np.save(samples, inputs.numpy())
        stopwatches = {}
        for backend, folder in folders.items():
            spec = {
                "backend": backend,
                "folder": str(folder),
                "inputs": str(samples),
                "threads": threads,
            }
            worker = [sys.executable, "-m", "offramp.inference.timing_worker", json.dumps(spec)]
            stopwatches[backend] = ProcessStopwatch(worker)
            stack.callback(stopwatches[backend].close)
        return time_engines(
            stopwatches,
            result,
            runner.network.costs(inputs),
            batch_sizes=batch_sizes,
            rounds=rounds,
            hardware=hardware_name(inputs.device),
            threads=threads,
        )


def _check_bundle(folder: Path, runner: AdaptiveRunner, inputs: Tensor) -> None:
    bundle = read_bundle(folder)
    if bundle.policy != policy_to_dict(runner.policy):
        raise ArtifactError(
            f"The bundle {folder} holds another policy than the run: it was calibrated since. "
            "Export it again: offramp export RUN"
        )
    if bundle.plain_file is None:
        raise ArtifactError(
            f"The bundle {folder} holds no plain network to be timed against. "
            "Export it again with --plain."
        )
    if bundle.quantized is None:
        check_early_answers(Session(bundle).run(inputs), runner, inputs)
