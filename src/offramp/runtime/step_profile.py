"""Times of a bundle's steps on this machine, for single samples: a device's profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy.typing as npt
import onnxruntime

from offramp.artifacts import read_json, write_json
from offramp.decoding import Count, Positive, decode
from offramp.errors import ArtifactError
from offramp.runtime.bundle import Bundle
from offramp.runtime.examples import example_inputs
from offramp.runtime.hardware import processor_name
from offramp.runtime.session import Session

Array = npt.NDArray[Any]

PROFILE_FILE = "profile.json"
_REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Milliseconds of a bundle's steps on a machine.

    Attributes:
        exits: The exit that each step ends with.
        step_ms: Of each step with a single sample, nobody leaving: medians.
        weights_sha256: Of the network that was timed.
        hardware: The machine's processor.
        threads: Threads that computed; None for onnxruntime's choice.
        versions: Of the engine.
    """

    exits: tuple[Count, ...]
    step_ms: tuple[Positive, ...]
    weights_sha256: str
    hardware: str
    threads: int | None
    versions: dict[str, str]

    @property
    def total_ms(self) -> float:
        """All steps."""
        return sum(self.step_ms)


@dataclass(frozen=True, kw_only=True)
class _ProfileFile:
    """All that the file says."""

    steps: StepProfile


def profile_steps(
    bundle: Bundle, *, threads: int | None = None, inputs: Sequence[Array] | None = None
) -> StepProfile:
    """Time the steps of a bundle on this machine; needs no torch and no data."""
    session = Session(bundle, threads=threads)
    sample = example_inputs(bundle) if inputs is None else inputs
    rounds = [session.time_steps(*sample) for _ in range(_REPEATS)]
    return StepProfile(
        exits=tuple(step.exit_index for step in bundle.steps),
        step_ms=tuple(map(median, zip(*rounds, strict=True))),
        weights_sha256=bundle.weights_sha256,
        hardware=processor_name(),
        threads=threads,
        versions={"onnxruntime": str(onnxruntime.__version__)},
    )


def write_step_profile(profile: StepProfile, path: Path) -> None:
    """Write a profile."""
    write_json(path, {"steps": asdict(profile)})


def read_step_profile(path: Path, bundle: Bundle) -> StepProfile:
    """Read what another machine measured."""
    try:
        profile = decode(read_json(path), _ProfileFile).steps
    except ArtifactError as error:
        raise ArtifactError(
            f"Expected the times of a bundle's steps in {path}: offramp time BUNDLE --steps writes "
            f"them. Got something else ({error})."
        ) from error
    exits = tuple(step.exit_index for step in bundle.steps)
    if len(profile.step_ms) != len(profile.exits):
        raise ArtifactError(
            f"Expected milliseconds above 0 of {len(profile.exits)} steps in {path}. "
            f"Got {profile.step_ms}."
        )
    if profile.weights_sha256 != bundle.weights_sha256 or profile.exits != exits:
        raise ArtifactError(
            f"{path} is of another network or of other exits than {bundle.folder}. Time this "
            "bundle there: offramp time BUNDLE --steps"
        )
    return profile
