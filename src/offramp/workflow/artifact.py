"""Opening what RUN names, a run folder or a bundle, so that commands need not ask which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.artifacts import require_run
from offramp.calibration.asked import Asked
from offramp.calibration.bundles import collect_steps, sweep_session
from offramp.calibration.evidence import Evidence
from offramp.errors import InvalidArgumentError
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy
from offramp.runtime import Bundle, Session, read_bundle
from offramp.runtime.bundle import is_bundle
from offramp.runtime.chosen_on import CALIBRATION_SPLIT, ChosenOn
from offramp.runtime.examples import example_inputs
from offramp.runtime.preprocessing import AnyPreprocessing
from offramp.workflow.preprocessing import preprocessing_of
from offramp.workflow.samples import AnySamples, Samples, samples_of_bundle

if TYPE_CHECKING:  # a bundle is opened without torch
    from offramp.families.family import TorchRunner

_TRIED = {"exits": None, "skip": GatePolicy.tried, "halting": HaltingPolicy.tried}
"""Thresholds to choose from, by the family of a bundle."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run or a bundle, calibrated or not.

    Attributes:
        name: What figures call it.
        recipe: Name of its recipe; None for a network of the user's own.
        samples: Loads splits of its data, or of data as users have it.
        num_exits: Exits of the network, those that are off in a bundle counted.
        thresholds: Those to choose from where one steers the network; None for exits.
        collect: From samples to what choosing needs; of a bundle, of the exits that are on.
    """

    name: str
    recipe: str | None
    samples: AnySamples
    num_exits: int
    thresholds: tuple[float, ...] | None
    collect: Callable[[object], Evidence[Any]]


@dataclass(frozen=True, kw_only=True)
class Artifact(Opened):
    """A run or a bundle, ready to answer.

    Attributes:
        runner: Answers batches that are on the device.
        device: Where its inputs belong.
        name: What figures call it: the recipe's name, or the folder's.
        class_names: Name of each class; empty where none were given.
        target: What its policy was asked for; None where that is not known.
        preprocessing: Says how samples become inputs.
        note: What a bundle does not say and was taken for granted; None where it says all.
        why_in_sample: From samples to why figures on them can be too good: they trained the
            network or may have chosen its thresholds. None for others.
    """

    runner: TorchRunner[Any, Any] | Session
    device: str
    class_names: tuple[str, ...]
    target: Asked | None
    preprocessing: Callable[[], AnyPreprocessing]
    why_in_sample: Callable[[Samples], str | None]
    note: str | None = None


def pick_device(device: str | None) -> str:
    """Decide where to compute."""
    if device == "cpu":
        return device
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cuda":
        raise InvalidArgumentError(f"The device must be cpu or cuda. Got {device!r}.")
    if not torch.cuda.is_available():
        raise InvalidArgumentError(
            "The device cuda was asked for, but torch sees no CUDA device here. Use --device cpu."
        )
    return device


def open_artifact(folder: Path, device: str | None = None, network: str | None = None) -> Artifact:
    """Open a run, which torch runs, or a bundle, which onnxruntime runs.

    ``network`` is the FILE.py:function of the command line, for a run of a network of one's own.
    """
    if not is_bundle(folder):
        require_run(folder)
        from offramp.workflow.opened_run import open_run  # torch

        return open_run(folder, device, network)
    refuse_network(folder, network)
    return _open_bundle(folder, device)


def refuse_network(bundle: Path, network: str | None) -> None:
    """Raise InvalidArgumentError if code was given for a bundle, which runs without."""
    if network is not None:
        raise InvalidArgumentError(
            f"--network is for a run. {bundle} is a bundle, which holds its network: leave it out."
        )


def _open_bundle(folder: Path, device: str | None) -> Artifact:
    if pick_device(device or "cpu") != "cpu":
        raise InvalidArgumentError(
            f"The device of a bundle must be cpu: onnxruntime runs it there. Got {device!r}."
        )
    bundle = read_bundle(folder)
    session = Session(bundle)
    recipe: str | None = None
    note: str | None = None
    chosen = bundle.calibration
    samples: AnySamples
    if bundle.recipe is None:
        preprocessing, note = preprocessing_of(bundle)
        num_classes = session.run(*example_inputs(bundle)).output.shape[1]
        samples = samples_of_bundle(bundle, preprocessing, num_classes=num_classes)
    else:
        from offramp.workflow.recipe_samples import RecipeSamples, recipe_of  # torch

        known = recipe_of(bundle)
        recipe = known.name
        samples = RecipeSamples(recipe=known, data=None, class_names=bundle.class_names)
    return Artifact(
        runner=session,
        device="cpu",
        name=recipe or bundle.folder.name,
        recipe=recipe,
        samples=samples,
        class_names=bundle.class_names,
        num_exits=bundle.num_exits,
        thresholds=_TRIED[bundle.family],
        target=Asked.from_record(None if chosen is None else asdict(chosen)),
        preprocessing=lambda: preprocessing_of(bundle)[0],
        collect=partial(sweep_session if _TRIED[bundle.family] else collect_steps, session),
        why_in_sample=partial(_why_in_sample_of_bundle, folder, bundle),
        note=note,
    )


def why_in_sample(
    folder: Path, samples: Samples, chosen_on: ChosenOn | None, is_known: bool
) -> str | None:
    """Say why figures on samples can be too good, by their split or by what is in them.

    One in a hundred may be among those that chose the thresholds by chance, as blank pictures are.
    """
    num_samples = len(samples.batches)
    known = 0 if chosen_on is None else chosen_on.count_among(samples.batches.hashes())
    if samples.split != "train" and known > num_samples // 100:
        return (
            f"{known:,} of the {num_samples:,} samples of {samples.split} chose the thresholds of "
            f"{folder}"
        )
    if not is_known:
        return None
    return f"The samples of {samples.split} trained {folder} or may have chosen its thresholds"


def _why_in_sample_of_bundle(folder: Path, bundle: Bundle, samples: Samples) -> str | None:
    chosen_on = None if bundle.calibration is None else bundle.calibration.data
    # One of a recipe may not say which samples chose its thresholds.
    may_have_chosen = samples.split == CALIBRATION_SPLIT and bundle.recipe is not None
    is_same = chosen_on is not None and chosen_on.sha256 == samples.fingerprint
    is_known = is_same or may_have_chosen or samples.split == "train"
    return why_in_sample(folder, samples, chosen_on, is_known)
