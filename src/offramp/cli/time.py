"""``offramp time``."""

from __future__ import annotations

from pathlib import Path

from offramp.cli.options import Time, write_figures
from offramp.errors import InvalidArgumentError
from offramp.runtime import read_bundle
from offramp.runtime.bundle import find_bundle, is_bundle
from offramp.runtime.step_profile import PROFILE_FILE, profile_steps, write_step_profile


def time(asked: Time) -> None:
    """Time a run or a bundle, or only a bundle's steps."""
    if asked.steps:
        _time_steps(asked.run, asked.threads)
        return
    backends = _parse_backends(asked.backend, asked.run)
    sizes = None if asked.batch_size is None else _parse_batch_sizes(asked.batch_size)
    if asked.bundle is not None and is_bundle(asked.run):
        raise InvalidArgumentError(f"--bundle is for a run; {asked.run} is a bundle already.")
    from offramp.workflow.time import time as time_artifact  # --steps needs no more than numpy

    timing = time_artifact(
        asked.run,
        backends,
        bundle=asked.bundle,
        batch_sizes=sizes,
        threads=asked.threads,
        data=asked.data,
        split=asked.split,
        subset=asked.subset,
        device=asked.device,
        network=asked.network,
    )
    if asked.json_file != "-":
        print(timing)
    if asked.json_file is not None:
        write_figures(timing.to_dict(), asked.json_file)


def _time_steps(run: Path, threads: int | None) -> None:
    bundle = read_bundle(find_bundle(run))
    profile = profile_steps(bundle, threads=threads)
    write_step_profile(profile, bundle.folder / PROFILE_FILE)
    times = ", ".join(f"{ms:.3f}" for ms in profile.step_ms)
    print(f"milliseconds of each step, single samples: {times}")
    print(f"{profile.hardware}; written to {bundle.folder / PROFILE_FILE}")


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
