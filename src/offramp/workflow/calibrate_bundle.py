"""Choosing the thresholds of a bundle and writing them into it; its ONNX files stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from offramp.calibration.asked import Asked
from offramp.calibration.bundles import policy_of_steps
from offramp.calibration.evidence import Evidence, choose_policy
from offramp.calibration.guarantee import calibrate_with_guarantee
from offramp.decoding import decode
from offramp.errors import ExportMismatchError, InSampleError, InvalidArgumentError
from offramp.measure.agreement import SINGLE_SAMPLES
from offramp.policy.as_dict import policy_from_dict
from offramp.policy.routing_policy import RoutingPolicy
from offramp.runtime import Bundle, Session, with_routing_threshold, with_thresholds
from offramp.runtime.bundle import write_bundle
from offramp.runtime.chosen_on import Choosing, written_hashes
from offramp.workflow.artifact import Artifact, open_artifact
from offramp.workflow.chosen import Chosen, describe_choice, read_thresholds
from offramp.workflow.population import describe_population, evidence_for, name_prior, read_prior
from offramp.workflow.samples import CALIBRATION, Samples
from offramp.workflow.wanted import Wanted

_WORDS = {
    "exits": ("early exit", "the final exit"),
    "skip": ("skipping", "the whole network"),
    "halting": ("dropping tokens", "the network with a threshold of 1"),
}
"""The cheap way and the whole network, in words, by family."""


def calibrate_bundle(
    folder: Path,
    wanted: Wanted,
    *,
    data: str | None = None,
    split: str | None = None,
    subset: int | None = None,
    prior: str | None = None,
) -> Chosen:
    """Choose thresholds on labelled samples, and write them into the bundle."""
    opened = open_artifact(folder)
    session: Any = opened.runner
    bundle: Bundle = session.bundle
    _refuse_what_is_in_the_files(bundle, wanted)
    _refuse_what_cannot_be_chosen(bundle)
    samples = opened.samples.load(split, data=data, subset=subset, preferred=CALIBRATION)
    if samples.split == "train":
        raise InSampleError(
            f"The samples of train trained {folder}: thresholds chosen on them expect too much. "
            f"Use --split with one of {', '.join(CALIBRATION)}, or other samples."
        )
    evidence, about_data = _evidence(opened, samples, prior)
    evidence = evidence_for(wanted.guarantee, evidence, about_data)
    if wanted.guarantee is None:
        chosen = choose_policy(evidence, **wanted.target)
        promise = None
    else:
        chosen = calibrate_with_guarantee(evidence, **wanted.risk_limit)
        assert chosen.guarantee is not None
        way, last = _WORDS[bundle.family]
        population = f"{samples.name}, {samples.split}, classes {about_data['class_prior']}"
        promise = asdict(chosen.guarantee) | {
            "sentence": chosen.guarantee.sentence(population, way=way, last=last),
            "found_on": samples.split,
        }
    about = describe_choice(wanted, about_data, chosen, promise, evidence)
    # Exits that are off have no step, and are named in the bundle.
    for point in about["front"]["points"] if bundle.family == "exits" else ():
        thresholds = [math.inf if t is None else t for t in point["thresholds"]]
        point["thresholds"] = _with_numbers(bundle, thresholds).policy["thresholds"]
    made = _with_numbers(bundle, chosen.policy.thresholds)
    made = replace(made, calibration=decode(about, Choosing))
    _check_single(made, samples.batches)
    write_bundle(made)
    return Chosen(
        calibration=chosen,
        num_samples=len(samples.batches),
        about=about,
        doubt=evidence.doubt(Asked.from_record(about)),
        temperatures=None,
        timed=None,
        profile=None,
    )


def set_bundle_by_hand(folder: Path, thresholds: str, wanted: Wanted) -> Bundle:
    """Write thresholds into a bundle: numbers or "off", separated by commas; or the only one."""
    session: Any = open_artifact(folder).runner
    bundle: Bundle = session.bundle
    _refuse_what_is_in_the_files(bundle, wanted)
    num_steps = len(bundle.steps) if bundle.family == "exits" else 2
    values = read_thresholds(thresholds, num_steps)
    if any(map(math.isnan, values)):
        raise InvalidArgumentError(
            f'Expected numbers or "off" for --thresholds. Got {thresholds!r}: NaN is no threshold.'
        )
    made = _with_numbers(bundle, values)
    asked = Choosing(asked={"thresholds": thresholds})
    made = replace(made, calibration=asked)
    write_bundle(made)
    return made


def _with_numbers(bundle: Bundle, thresholds: Sequence[float]) -> Bundle:
    """The bundle with other thresholds, or with another one of its gates or tokens."""
    if bundle.family == "exits":
        return with_thresholds(bundle, thresholds)
    (threshold,) = thresholds
    return with_routing_threshold(bundle, threshold)


def _refuse_what_is_in_the_files(bundle: Bundle, wanted: Wanted) -> None:
    """Refuse options about what a bundle's ONNX files hold, or what takes the network itself."""
    rule = bundle.policy.get("rule")
    if wanted.rule not in (None, rule):
        raise InvalidArgumentError(
            f"The rule of {bundle.folder} is {rule}, which its files compute. Got --rule "
            f"{wanted.rule}: calibrate the run and export it, or export a policy of that rule."
        )
    held = {
        "--patience": wanted.patience,
        "--pixel-threshold": wanted.pixel_threshold,
        "--temperatures": wanted.temperatures,
        "--budget-ms": wanted.budget_ms,
        "--for latency": wanted.timing,
    }
    given = [name for name, value in held.items() if value is not None]
    if given:
        raise InvalidArgumentError(
            f"{given[0]} is for a run. {bundle.folder} is a bundle, which takes new thresholds "
            "only: calibrate the run and export it."
        )


def _refuse_what_cannot_be_chosen(bundle: Bundle) -> None:
    """Refuse bundles whose exits are off, where those that are on go by them."""
    policy: Any = policy_from_dict(dict(bundle.policy))
    if isinstance(policy, RoutingPolicy):
        return
    if len(bundle.steps) == 1:
        raise InvalidArgumentError(
            f"The bundle {bundle.folder} has no exit to choose thresholds for: they were off when "
            "it was exported. Export with thresholds in [0, 1], or with policy None."
        )
    kind = bundle.policy["kind"]
    if policy_of_steps(bundle, policy) is None:
        raise InvalidArgumentError(
            f"The policy of {bundle.folder} is a {kind}, and some of its exits are off: calibrate "
            "the run and export it."
        )
    if kind == "patience" and bundle.policy.get("thresholds") is None:
        raise InvalidArgumentError(
            f"The files of {bundle.folder} count exits that agree, and take no thresholds. Export "
            "the run again."
        )


def _evidence(
    opened: Artifact, samples: Samples, prior: str | None
) -> tuple[Evidence[Any], dict[str, Any]]:
    """Collect the logits of every exit, and the record of the samples for the bundle."""
    evidence: Any = opened.collect(samples.batches)
    shares = samples.shares if prior is None else read_prior(prior, samples.class_names)
    asked = name_prior(prior, shares, samples.class_names)
    if shares is not None or samples.by_class:
        evidence = evidence.for_population(shares)
    return evidence, {
        "name": samples.name,
        "split": samples.split,
        "num_samples": len(samples.batches),
        **describe_population(evidence, asked or samples.class_prior),
        "sha256": samples.fingerprint,
        "hashes": written_hashes(samples.batches.hashes()),
    }


def _check_single(bundle: Bundle, batches: Any) -> None:
    """Make sure that the file for single samples takes the thresholds as the steps do."""
    order = np.random.default_rng(0).permutation(len(batches))
    inputs, _ = batches.__getitems__(order[:SINGLE_SAMPLES].tolist())
    session, several = Session(bundle), inputs if isinstance(inputs, tuple) else (inputs,)
    together = session.run(*several)
    alone = [
        session.run(*(tensor[row : row + 1] for tensor in several)).work
        for row in range(len(several[0]))
    ]
    moved = int((together.work != np.concatenate(alone)).any(1).sum())
    if moved > len(alone) // 8:  # a sample near a threshold may go either way
        raise ExportMismatchError(
            f"The bundle {bundle.folder} answers {moved} of {len(alone)} samples in another way "
            "one by one than together. Nothing was written: please report this."
        )
