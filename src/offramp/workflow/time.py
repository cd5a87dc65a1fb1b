"""Time a run or a bundle on real samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.artifacts import BUNDLE_FOLDER
from offramp.data.arrays import ArrayBatches
from offramp.errors import InvalidArgumentError
from offramp.evaluation.processes import time_bundle, time_in_processes
from offramp.evaluation.stopwatch import LEAST_SAMPLES
from offramp.evaluation.timing import Timing, time_runner
from offramp.runtime import Session
from offramp.workflow.artifact import open_artifact

if TYPE_CHECKING:  # a bundle is timed without torch
    from offramp.data.images import Batches

_SIZES = (1, 32, 256)
_SAMPLES = 2048
"""Real test samples that are timed, at most."""


def time(
    run: Path,
    backends: Sequence[str],
    *,
    bundle: Path | None = None,
    batch_sizes: list[int] | None = None,
    threads: int | None = None,
    data: str | None = None,
    split: str | None = None,
    subset: int | None = None,
    device: str | None = None,
    network: str | None = None,
) -> Timing:
    """Time each backend on its folder; a lone one in this process."""
    _check_threads(threads)
    opened = open_artifact(run, device, network)
    batches = opened.samples.load(split, data=data, subset=subset).batches
    count = min(_SAMPLES, max(LEAST_SAMPLES, 8 * batches.run_batch_size))
    inputs = _draw(batches, count)
    runner = opened.runner
    sizes = batch_sizes or [size for size in _SIZES if size <= min(count, len(batches))]
    if isinstance(runner, Session):
        return time_bundle(runner, inputs, batch_sizes=sizes, threads=threads)
    import torch  # a bundle is timed without

    use_threads(threads)
    if isinstance(inputs, tuple):
        raise InvalidArgumentError(
            f"Expected a network of one input to time in torch. {run} takes {len(inputs)}: export "
            "it and time the bundle."
        )
    inputs = torch.as_tensor(inputs)
    if list(backends) == ["torch"]:
        return time_runner(runner, inputs.to(opened.device), batch_sizes=sizes)
    runner.network.cpu()
    folders = {"torch": run, "onnxruntime": bundle or run / BUNDLE_FOLDER}
    return time_in_processes(
        runner,
        inputs,
        {name: folders[name] for name in backends},
        batch_sizes=sizes,
        network=network,
    )


def use_threads(threads: int | None) -> None:
    """Let torch compute with so many threads."""
    _check_threads(threads)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise InvalidArgumentError(f"--threads must be an int of at least 1. Got {threads}.")


def _draw(batches: Batches | ArrayBatches, count: int) -> Any:
    """Inputs of so many samples, drawn at random: one, or several as a tuple."""
    order = np.random.default_rng(0).permutation(len(batches))
    inputs, _ = batches.__getitems__(order[:count].tolist())
    return inputs
