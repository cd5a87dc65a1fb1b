"""``offramp time``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.artifacts import BUNDLE_FOLDER
from offramp.cli.options import (
    DataOption,
    DeviceOption,
    JsonOption,
    RunOrBundle,
    use_threads,
    write_figures,
)
from offramp.errors import InvalidArgumentError
from offramp.workflow.artifact import Artifact, find_bundle, is_bundle, open_artifact

if TYPE_CHECKING:
    from torch import Tensor

    from offramp.evaluation.timing import Timing

_SIZES = (1, 32, 256)
_SAMPLES = 2048
"""Real test samples that are timed, at most."""


def time(
    run: RunOrBundle,
    batch_size: Annotated[
        str | None,
        typer.Option(metavar="B,...", help="Samples a batch; default 1,32,256 as far as they go."),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="torch, onnxruntime, or both; default torch, for a bundle onnxruntime.",
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What onnxruntime runs; default RUN/bundle."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that compute.")] = None,
    steps: Annotated[
        bool,
        typer.Option(
            "--steps",
            help="Only time a bundle's steps on this machine, for offramp plan: writes "
            "BUNDLE/profile.json; needs no data and no torch.",
        ),
    ] = False,
    data: DataOption = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Time running less against the plain network, and against choosing afterwards."""
    if steps:
        _time_steps(run, threads)
        return
    backends = _parse_backends(backend, run)
    wanted = None if batch_size is None else _parse_batch_sizes(batch_size)
    if bundle is not None and is_bundle(run):
        raise InvalidArgumentError(f"--bundle is for a run; {run} is a bundle already.")
    asked = open_artifact(run, device)
    use_threads(threads)
    folders = {"torch": run, "onnxruntime": bundle or run / BUNDLE_FOLDER}
    timing = _time_backends(
        asked, _real_samples(asked, data), {name: folders[name] for name in backends}, wanted
    )
    if json_file != "-":
        print(timing)
    if json_file is not None:
        write_figures(timing.to_dict(), json_file)


def _time_backends(
    asked: Artifact, inputs: Tensor, folders: dict[str, Path], wanted: list[int] | None
) -> Timing:
    """Time each backend on its folder; a lone one in this process."""
    from offramp.evaluation.timing import time_runner
    from offramp.runtime import Session

    runner = asked.runner
    sizes = wanted or [size for size in _SIZES if size <= len(inputs)]
    if isinstance(runner, Session):
        from offramp.evaluation.processes import time_bundle

        return time_bundle(runner, inputs, batch_sizes=sizes)
    if list(folders) == ["torch"]:
        return time_runner(runner, inputs.to(asked.device), batch_sizes=sizes)
    from offramp.evaluation.processes import time_in_processes

    runner.network.cpu()
    return time_in_processes(runner, inputs, folders, batch_sizes=sizes)


def _time_steps(run: Path, threads: int | None) -> None:
    from offramp.runtime import read_bundle
    from offramp.runtime.step_profile import PROFILE_FILE, profile_steps, write_step_profile

    bundle = read_bundle(find_bundle(run))
    profile = profile_steps(bundle, threads=threads)
    write_step_profile(profile, bundle.folder / PROFILE_FILE)
    times = ", ".join(f"{ms:.3f}" for ms in profile.step_ms)
    print(f"milliseconds of each step, single samples: {times}")
    print(f"{profile.hardware}; written to {bundle.folder / PROFILE_FILE}")


def _real_samples(asked: Artifact, data: str | None) -> Tensor:
    import torch

    from offramp.data.sources import SOURCES
    from offramp.evaluation.stopwatch import LEAST_SAMPLES
    from offramp.runs.run import load_batches

    split = SOURCES[asked.recipe.data].judging_split
    batches, _, _ = load_batches(asked.recipe, split, data or asked.data)
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))
    count = min(_SAMPLES, max(LEAST_SAMPLES, 8 * batches.run_batch_size))
    inputs, _ = batches.__getitems__(order[:count].tolist())
    return inputs


def _parse_backends(text: str | None, run: Path) -> list[str]:
    if text is None:
        return ["onnxruntime" if is_bundle(run) else "torch"]
    names = text.split(",")
    if not set(names) <= {"torch", "onnxruntime"}:
        raise InvalidArgumentError(
            f"--backend must be torch, onnxruntime or torch,onnxruntime. Got {text!r}."
        )
    if "torch" in names and is_bundle(run):
        raise InvalidArgumentError(
            f"--backend must be onnxruntime for a bundle, which {run} is. Got {text!r}: "
            "torch can be timed on the run that was exported."
        )
    return names


def _parse_batch_sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgumentError(
            f"Expected whole numbers separated by commas for --batch-size. Got {text!r}."
        ) from error
