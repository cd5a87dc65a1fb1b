"""Opening a run, which torch runs: to answer, or for its curve, and what it says of samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offramp.calibration.asked import Asked
from offramp.data.preprocessing import inputs_of
from offramp.decoding import decode
from offramp.errors import ArtifactError
from offramp.families import family_of, make_runner
from offramp.model.multi_exit import Features, as_features
from offramp.policy.as_dict import policy_to_dict
from offramp.policy.policies import Policy
from offramp.policy.routing_policy import RoutingPolicy
from offramp.results import AdaptiveResult
from offramp.runs.own_network import load_run, num_inputs_of
from offramp.runs.run import Run, is_in_sample
from offramp.runtime.answers import SampleAnswer, describe_answers
from offramp.runtime.chosen_on import ChosenOn
from offramp.runtime.preprocessing import AnyPreprocessing
from offramp.workflow.artifact import Artifact, Opened, pick_device, why_in_sample
from offramp.workflow.held_out import evidence_by, samples_of_run
from offramp.zoo import Network


def open_run(folder: Path, device: str | None = None, named: str | None = None) -> Artifact:
    """Open a run, ready to answer."""
    loaded = load_run(folder, named)
    recipe = loaded.recipe
    where = pick_device(device)
    network = loaded.network.to(where)
    said = (loaded.calibration or {}).get("data")
    chosen_on = None if said is None else decode(said, ChosenOn)
    return Artifact(
        runner=make_runner(network, loaded.policy),
        device=where,
        name=loaded.folder.name if recipe is None else recipe.name,
        recipe=None if recipe is None else recipe.name,
        samples=samples_of_run(loaded),
        class_names=loaded.class_names,
        num_exits=network.num_exits,
        thresholds=family_of(network).thresholds,
        target=Asked.from_record(loaded.calibration),
        preprocessing=partial(preprocessing_of_run, loaded),
        collect=evidence_by(network),
        why_in_sample=lambda samples: why_in_sample(
            folder, samples, chosen_on, is_in_sample(loaded, samples.split, samples.fingerprint)
        ),
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


def open_uncalibrated(folder: Path, device: str | None, named: str | None) -> Opened:
    """Open a run whose policy may still be to be chosen."""
    loaded = load_run(folder, named)
    network = loaded.network.to(pick_device(device))
    return Opened(
        name=str(folder),
        recipe=None if loaded.recipe is None else loaded.recipe.name,
        samples=samples_of_run(loaded),
        num_exits=network.num_exits,
        thresholds=family_of(network).thresholds,
        collect=evidence_by(network),
    )


def answer_samples(
    folder: Path, samples: Sequence[str], device: str | None, network: str | None
) -> list[SampleAnswer]:
    """Answer picture files, or texts, as a run does."""
    opened: Any = open_run(folder, device, network)
    runner = opened.runner
    inputs = inputs_of(samples, opened.preprocessing(), num_inputs=num_inputs_of(runner.network))
    return answer_run(
        runner.network,
        runner.policy,
        opened.class_names,
        tuple(torch.from_numpy(array).to(opened.device) for array in inputs),
    )
