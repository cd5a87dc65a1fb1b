"""Choosing the thresholds of a bundle and writing them into it; its ONNX files stay."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from offramp.calibration.asked import Asked
from offramp.calibration.collect import collect_from_session
from offramp.calibration.evidence import Evidence, choose_policy
from offramp.calibration.guarantee import calibrate_with_guarantee
from offramp.decoding import decode
from offramp.errors import ExportMismatchError, InSampleError, InvalidArgumentError
from offramp.families.agreement import SINGLE_SAMPLES
from offramp.policy.as_dict import policy_from_dict
from offramp.policy.policies import ThresholdedPolicy
from offramp.runtime import Bundle, Session, with_routing_threshold, with_thresholds
from offramp.runtime.bundle import write_bundle
from offramp.runtime.chosen_on import Choosing
from offramp.workflow.artifact import open_artifact
from offramp.workflow.calibrate import Chosen, describe_choice, read_thresholds
from offramp.workflow.held_out import (
    describe_population,
    evidence_for,
    name_prior,
    read_prior,
)
from offramp.workflow.samples import CALIBRATION, Samples, draw
from offramp.workflow.wanted import Wanted


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
    policy = _policy_of_steps(bundle)
    samples = opened.samples.load(split, data=data, subset=subset, preferred=CALIBRATION)
    if samples.split == "train":
        raise InSampleError(
            f"The samples of train trained {folder}: thresholds chosen on them expect too much. "
            f"Use --split with one of {', '.join(CALIBRATION)}, or other samples."
        )
    evidence, about_data = _evidence(session, samples, prior)
    evidence = evidence_for(wanted.guarantee, evidence, about_data)
    if wanted.guarantee is None:
        chosen = choose_policy(evidence, rule=policy, **wanted.target)
        promise = None
    else:
        chosen = calibrate_with_guarantee(evidence, rule=policy, **wanted.risk_limit)
        assert chosen.guarantee is not None
        population = f"{samples.name}, {samples.split}, classes {about_data['class_prior']}"
        promise = asdict(chosen.guarantee) | {
            "sentence": chosen.guarantee.sentence(population),
            "found_on": samples.split,
        }
    about = describe_choice(wanted, about_data, chosen, promise)
    made = with_thresholds(bundle, chosen.policy.thresholds)
    made = replace(made, calibration=decode(about, Choosing))
    _check_single(made, draw(samples.batches, SINGLE_SAMPLES))
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
    _refuse_what_is_in_the_files(bundle, wanted, by_hand=True)
    if bundle.family == "exits":
        made = with_thresholds(bundle, read_thresholds(thresholds, len(bundle.steps)))
    else:
        (threshold,) = read_thresholds(thresholds, 2)
        made = with_routing_threshold(bundle, threshold)
    asked = Choosing(asked={"thresholds": thresholds})
    made = replace(made, calibration=asked)
    write_bundle(made)
    return made


def _refuse_what_is_in_the_files(bundle: Bundle, wanted: Wanted, *, by_hand: bool = False) -> None:
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
    if bundle.family != "exits" and not by_hand:
        raise InvalidArgumentError(
            f"The bundle {bundle.folder} skips blocks or drops tokens: calibrate the run that it "
            "was exported from, or set its threshold by hand with --thresholds."
        )


def _policy_of_steps(bundle: Bundle) -> ThresholdedPolicy:
    """The policy of a bundle over its steps, nobody leaving: exits that are off have no step."""
    policy: Any = policy_from_dict(dict(bundle.policy))
    exits = [step.exit_index for step in bundle.steps]
    if len(exits) == 1:
        raise InvalidArgumentError(
            f"The bundle {bundle.folder} has no exit to choose thresholds for: they were off when "
            "it was exported. Export with thresholds in [0, 1], or with policy None."
        )
    if len(exits) < policy.num_exits:
        kept: dict[str, Any] = {"thresholds": (math.inf,) * (len(exits) - 1)}
        if not policy.takes_temperatures:
            raise InvalidArgumentError(
                f"The policy of {bundle.folder} is a {policy_kind(bundle)}, and some of its exits "
                "are off: calibrate the run and export it."
            )
        if policy.temperatures is not None:
            kept["temperatures"] = tuple(policy.temperatures[k] for k in exits)
        policy = replace(policy, **kept)
    nobody: ThresholdedPolicy = policy.with_thresholds((math.inf,) * (len(exits) - 1))
    return nobody


def policy_kind(bundle: Bundle) -> str:
    """Name the kind of policy that a bundle has."""
    return str(bundle.policy.get("kind"))


def _evidence(
    session: Session, samples: Samples, prior: str | None
) -> tuple[Evidence[Any], dict[str, Any]]:
    """Collect the logits of every exit, and the record of the samples for the bundle."""
    evidence: Any = collect_from_session(session, samples.batches)
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
    }


def _check_single(bundle: Bundle, inputs: Any) -> None:
    """Make sure that the file for single samples takes the thresholds as the steps do."""
    session, several = Session(bundle), inputs if isinstance(inputs, tuple) else (inputs,)
    together = session.run(*several)
    alone = [
        session.run(*(tensor[row : row + 1] for tensor in several)).exit_index[0]
        for row in range(len(several[0]))
    ]
    moved = int((together.exit_index != alone).sum())
    if moved > len(alone) // 8:  # a sample near a threshold may go either way
        raise ExportMismatchError(
            f"The bundle {bundle.folder} answers {moved} of {len(alone)} samples by another exit "
            "one by one than together. Nothing was written: please report this."
        )
