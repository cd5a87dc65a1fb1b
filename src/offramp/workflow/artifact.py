"""Opening what RUN names, a run folder or a bundle, so that commands need not ask which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.artifacts import BUNDLE_FOLDER
from offramp.errors import ArtifactError, InvalidArgumentError

if TYPE_CHECKING:
    from torch import Tensor

    from offramp.calibration.asked import Asked
    from offramp.calibration.logits import ExitLogits
    from offramp.families.family import Family, TorchRunner
    from offramp.policy.policies import Policy
    from offramp.policy.routing_policy import RoutingPolicy
    from offramp.recipes.recipe import Recipe
    from offramp.runtime import Bundle, Session
    from offramp.runtime.answers import SampleAnswer
    from offramp.zoo import Network


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A run or a bundle, ready to answer.

    Attributes:
        runner: Answers batches that are on the device.
        device: Where its inputs belong.
        recipe: How the network was trained.
        class_names: Name of each class; empty where none were given.
        data: What ``--data`` was when it was trained; None if the default was taken or a bundle
            does not say.
        num_exits: Exits of the network, those that are off counted.
        family: Of the network.
        target: What its policy was asked for; None where that is not known, as of a bundle.
        answer: From a batch of inputs on the device to what is said of each sample.
        collect: From samples to the logits of every exit; of those that are on, for a bundle.
        has_seen: From a split and the fingerprint of its samples to whether they trained the
            network or may have chosen its thresholds.
    """

    runner: TorchRunner[Any, Any] | Session
    device: str
    recipe: Recipe
    class_names: tuple[str, ...]
    data: str | None
    num_exits: int
    family: Family[Any, Any]
    target: Asked | None
    answer: Callable[[Tensor], list[SampleAnswer]]
    collect: Callable[[object], ExitLogits]
    has_seen: Callable[[str, str], bool]


def is_bundle(folder: Path) -> bool:
    """Tell if a folder is to be read as a bundle; any other is read as a run."""
    from offramp.runtime.bundle import BUNDLE_FILE

    return (folder / BUNDLE_FILE).is_file()


def find_bundle(run: Path) -> Path:
    """Find the bundle that RUN names."""
    found = next((folder for folder in (run, run / BUNDLE_FOLDER) if is_bundle(folder)), None)
    if found is None:
        raise ArtifactError(
            f"Expected a bundle, or a run folder with one in it. {run} has none. "
            f"Make one: offramp export {run}"
        )
    return found


def pick_device(device: str | None) -> str:
    """Decide where to compute."""
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"The device must be cpu or cuda. Got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            "The device cuda was asked for, but torch sees no CUDA device here. Use --device cpu."
        )
    return device


def open_artifact(folder: Path, device: str | None = None) -> Artifact:
    """Open a run, which torch runs, or a bundle, which onnxruntime runs."""
    if is_bundle(folder):
        return _open_bundle(folder, device)
    return _open_run(folder, device)


def _open_run(folder: Path, device: str | None) -> Artifact:
    from offramp.calibration.asked import Asked
    from offramp.calibration.collect import collect
    from offramp.families import family_of, make_runner
    from offramp.runs.run import is_in_sample, load

    loaded = load(folder)
    recipe = loaded.require_recipe()
    where = pick_device(device)
    network = loaded.network.to(where)
    return Artifact(
        runner=make_runner(network, loaded.policy),
        device=where,
        recipe=recipe,
        class_names=loaded.class_names,
        data=loaded.data,
        num_exits=network.num_exits,
        family=family_of(network),
        target=Asked.from_record(loaded.calibration),
        answer=partial(answer_run, network, loaded.policy, loaded.class_names),
        collect=partial(collect, network),
        has_seen=partial(is_in_sample, loaded),
    )


def answer_run(
    network: Network,
    policy: Policy | RoutingPolicy | None,
    class_names: tuple[str, ...],
    inputs: Tensor,
) -> list[SampleAnswer]:
    """Say what a run answers, sample by sample."""
    from offramp.families import make_runner
    from offramp.policy.as_dict import policy_to_dict
    from offramp.results import AdaptiveResult
    from offramp.runtime.answers import describe_answers

    runner = make_runner(network, policy)
    result = runner.run(inputs)
    arrays: dict[str, Any] = {
        name: None if part is None else part.cpu().numpy() for name, part in vars(result).items()
    }
    return describe_answers(
        AdaptiveResult(**arrays),
        policy=policy_to_dict(runner.policy),
        class_names=class_names,
        plain_macs_B=network.plain_macs(inputs).numpy(),
        size=tuple(inputs.shape[2:]),
    )


def _answer_bundle(session: Session, inputs: Tensor) -> list[SampleAnswer]:
    from offramp.runtime.answers import describe_answers

    return describe_answers(
        session.run(inputs),
        policy=session.bundle.policy,
        class_names=session.bundle.class_names,
        plain_macs_B=session.plain_macs(inputs),
        size=tuple(inputs.shape[2:]),
    )


def _open_bundle(folder: Path, device: str | None) -> Artifact:
    from offramp.calibration.collect import collect_from_session
    from offramp.families import FAMILIES
    from offramp.runs.run import CALIBRATION_SPLIT
    from offramp.runtime import Session, read_bundle

    if pick_device(device or "cpu") != "cpu":
        raise InvalidArgumentError(
            f"The device of a bundle must be cpu: onnxruntime runs it there. Got {device!r}."
        )
    bundle = read_bundle(folder)
    recipe = recipe_of(bundle)
    session = Session(bundle)
    return Artifact(
        runner=session,
        device="cpu",
        recipe=recipe,
        class_names=bundle.class_names,
        data=None,
        num_exits=bundle.num_exits,
        family=FAMILIES[bundle.family],
        target=None,
        answer=partial(_answer_bundle, session),
        collect=partial(collect_from_session, session),
        # A bundle does not say which samples chose its thresholds.
        has_seen=lambda split, _: split in ("train", CALIBRATION_SPLIT),
    )


def recipe_of(bundle: Bundle) -> Recipe:
    """Find the recipe that a bundle's network was trained by."""
    from offramp.recipes.recipe import Recipe
    from offramp.runtime.bundle import BUNDLE_FILE

    if bundle.recipe is None:
        raise ArtifactError(
            f"The bundle {bundle.folder} holds a network of your own, without a recipe that names "
            "its data. Use Session(...).run() from Python."
        )
    try:
        return Recipe.from_dict(bundle.recipe)
    except ArtifactError as error:
        raise ArtifactError(f"{bundle.folder / BUNDLE_FILE} is damaged: {error}") from error
