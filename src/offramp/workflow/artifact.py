"""Opening what RUN names, a run folder or a bundle, so that commands need not ask which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.calibration.asked import Asked
from offramp.calibration.collect import collect, collect_from_session
from offramp.calibration.logits import ExitLogits
from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.families import FAMILIES, family_of, make_runner
from offramp.families.family import Family, TorchRunner
from offramp.model.multi_exit import Features, as_features
from offramp.policy.as_dict import policy_to_dict
from offramp.policy.policies import Policy
from offramp.policy.routing_policy import RoutingPolicy
from offramp.recipes.recipe import Recipe
from offramp.results import AdaptiveResult
from offramp.runs.own_network import load_run
from offramp.runs.run import CALIBRATION_SPLIT, Run, is_in_sample
from offramp.runtime import Bundle, Session, read_bundle
from offramp.runtime.answers import SampleAnswer, describe_answers
from offramp.runtime.bundle import BUNDLE_FILE, is_bundle
from offramp.runtime.examples import example_inputs
from offramp.runtime.preprocessing import AnyPreprocessing
from offramp.workflow.preprocessing import preprocessing_of
from offramp.workflow.samples import (
    AnySamples,
    RecipeSamples,
    samples_of_bundle,
    samples_of_run,
)
from offramp.zoo import Network


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A run or a bundle, ready to answer.

    Attributes:
        runner: Answers batches that are on the device.
        device: Where its inputs belong.
        name: What figures call it: the recipe's name, or the folder's.
        recipe: Name of its recipe; None for a network of the user's own.
        samples: Loads splits of its data, or of data as users have it.
        class_names: Name of each class; empty where none were given.
        num_exits: Exits of the network, those that are off counted.
        family: Of the network.
        target: What its policy was asked for; None where that is not known.
        preprocessing: Says how samples become inputs.
        note: What a bundle does not say and was taken for granted; None where it says all.
        collect: From samples to the logits of every exit; of those that are on, for a bundle.
        has_seen: From a split and the fingerprint of its samples to whether they trained the
            network or may have chosen its thresholds.
    """

    runner: TorchRunner[Any, Any] | Session
    device: str
    name: str
    recipe: str | None
    samples: AnySamples
    class_names: tuple[str, ...]
    num_exits: int
    family: Family[Any, Any]
    target: Asked | None
    preprocessing: Callable[[], AnyPreprocessing]
    collect: Callable[[object], ExitLogits]
    has_seen: Callable[[str, str], bool]
    note: str | None = None


def pick_device(device: str | None) -> str:
    """Decide where to compute."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"The device must be cpu or cuda. Got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(
            "The device cuda was asked for, but torch sees no CUDA device here. Use --device cpu."
        )
    return device


def open_artifact(folder: Path, device: str | None = None, network: str | None = None) -> Artifact:
    """Open a run, which torch runs, or a bundle, which onnxruntime runs.

    ``network`` is the FILE.py:function of the command line, for a run of a network of one's own.
    """
    if not is_bundle(folder):
        return _open_run(folder, device, network)
    refuse_network(folder, network)
    return _open_bundle(folder, device)


def refuse_network(bundle: Path, network: str | None) -> None:
    """Raise InvalidArgumentError if code was given for a bundle, which runs without."""
    if network is not None:
        raise InvalidArgumentError(
            f"--network is for a run. {bundle} is a bundle, which holds its network: leave it out."
        )


def _open_run(folder: Path, device: str | None, named: str | None) -> Artifact:
    loaded = load_run(folder, named)
    recipe = loaded.recipe
    where = pick_device(device)
    network = loaded.network.to(where)
    return Artifact(
        runner=make_runner(network, loaded.policy),
        device=where,
        name=loaded.folder.name if recipe is None else recipe.name,
        recipe=None if recipe is None else recipe.name,
        samples=samples_of_run(loaded),
        class_names=loaded.class_names,
        num_exits=network.num_exits,
        family=family_of(network),
        target=Asked.from_record(loaded.calibration),
        preprocessing=partial(preprocessing_of_run, loaded),
        collect=partial(collect, network),
        has_seen=partial(is_in_sample, loaded),
    )


def preprocessing_of_run(run: Run) -> AnyPreprocessing:
    """Say how samples become the inputs of a run."""
    found = run.preprocessing if run.recipe is None else run.recipe.preprocessing()
    if found is None:
        raise ArtifactError(
            f"The run {run.folder} does not say how samples become its inputs. Save it with "
            "preprocessing=Preprocessing(...) or TextPreprocessing(...)."
        )
    return found


def answer_run(
    network: Network,
    policy: Policy | RoutingPolicy | None,
    class_names: tuple[str, ...],
    inputs: Tensor | Features,
) -> list[SampleAnswer]:
    """Say what a run answers, sample by sample."""
    runner = make_runner(network, policy)
    result = runner.run(*as_features(inputs))
    arrays: dict[str, Any] = {
        name: None if part is None else part.cpu().numpy() for name, part in vars(result).items()
    }
    return describe_answers(
        AdaptiveResult(**arrays),
        policy=policy_to_dict(runner.policy),
        class_names=class_names,
        plain_macs_B=network.plain_macs(*as_features(inputs)).numpy(),
        size=tuple(as_features(inputs)[0].shape[2:]),
    )


def _open_bundle(folder: Path, device: str | None) -> Artifact:
    if pick_device(device or "cpu") != "cpu":
        raise InvalidArgumentError(
            f"The device of a bundle must be cpu: onnxruntime runs it there. Got {device!r}."
        )
    bundle = read_bundle(folder)
    session = Session(bundle)
    recipe = None if bundle.recipe is None else recipe_of(bundle)
    note: str | None = None
    chosen = bundle.calibration
    samples: AnySamples
    if recipe is None:
        preprocessing, note = preprocessing_of(bundle)
        num_classes = session.run(*example_inputs(bundle)).output.shape[1]
        samples = samples_of_bundle(bundle, preprocessing, num_classes=num_classes)
    else:
        samples = RecipeSamples(recipe=recipe, data=None, class_names=bundle.class_names)
    return Artifact(
        runner=session,
        device="cpu",
        name=bundle.folder.name if recipe is None else recipe.name,
        recipe=None if recipe is None else recipe.name,
        samples=samples,
        class_names=bundle.class_names,
        num_exits=bundle.num_exits,
        family=FAMILIES[bundle.family],
        target=Asked.from_record(None if chosen is None else asdict(chosen)),
        preprocessing=lambda: preprocessing_of(bundle)[0],
        collect=partial(collect_from_session, session),
        has_seen=partial(_bundle_has_seen, bundle),
        note=note,
    )


def _bundle_has_seen(bundle: Bundle, split: str, fingerprint: str) -> bool:
    known = None if bundle.calibration is None else bundle.calibration.data
    if known is not None and known.sha256 == fingerprint:
        return True
    # One of a recipe may not say which samples chose its thresholds.
    return split == "train" or (split == CALIBRATION_SPLIT and bundle.recipe is not None)


def recipe_of(bundle: Bundle) -> Recipe:
    """Find the recipe that a bundle's network was trained by."""
    if bundle.recipe is None:
        raise ArtifactError(
            f"The bundle {bundle.folder} holds a network of your own, without a recipe that names "
            "its data. Use Session(...).run() from Python."
        )
    try:
        return Recipe.from_dict(bundle.recipe)
    except ArtifactError as error:
        raise ArtifactError(f"{bundle.folder / BUNDLE_FILE} is damaged: {error}") from error
