"""Choosing a run's policy, and writing it into the run."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from offramp.artifacts import write_json
from offramp.calibration.asked import Asked
from offramp.calibration.chosen import Calibration
from offramp.calibration.evidence import choose_policy
from offramp.calibration.guarantee import calibrate_with_guarantee
from offramp.calibration.latency import (
    LatencyCalibration,
    calibrate_for_latency,
    calibrate_to_milliseconds,
)
from offramp.calibration.logits import ExitLogits
from offramp.calibration.risk import check_risk
from offramp.calibration.temperature import (
    describe_temperatures,
    fit_temperatures,
)
from offramp.calibration.thresholds import reached_under
from offramp.errors import InvalidArgumentError
from offramp.evaluation.profiling import profile_network
from offramp.evaluation.timing import check_batch_sizes
from offramp.exporting.profiling import profile_exported
from offramp.families import family_of
from offramp.measure.outputs import LABELS, MAPS
from offramp.measure.profile import Profile
from offramp.policy.confidence import confidence_from_entropy_nats
from offramp.policy.dense_policies import dense_policy
from offramp.policy.policies import PatiencePolicy, ThresholdedPolicy, ThresholdPolicy
from offramp.policy.routing_policy import RoutingPolicy
from offramp.policy.rules import RULES
from offramp.runs.run import Run, write_policy
from offramp.workflow.chosen import Chosen, describe_choice, read_thresholds, rule_named
from offramp.workflow.held_out import HeldOut, find_on_train, hold_out
from offramp.workflow.population import evidence_for
from offramp.workflow.wanted import LEARNED, Timing, Wanted

_LEAST_SURVIVORS = 100
"""An exit that fewer samples reach has the temperature that was fitted on all."""

PROFILE_FILE = "profile.json"
"""File of a run folder that keeps the times of its parts."""


def settle(wanted: Wanted, run: Run) -> Wanted:
    """Name the default rule of a network with exits; of any other, refuse what is about exits."""
    family = family_of(run.network)
    if family.thresholds is None:
        return replace(wanted, rule=wanted.rule or RULES[run.network.outputs.name].default)
    words = family.words
    given = {
        "--rule": wanted.rule,
        "--patience": wanted.patience,
        "--pixel-threshold": wanted.pixel_threshold,
        "--temperatures": wanted.temperatures,
        "--budget-ms": wanted.budget_ms,
        "--for latency": wanted.timing,
    }
    for name, value in given.items():
        if value is not None:
            raise InvalidArgumentError(
                f"{name} is about exits. The run {run.folder} {words.does} inside, and its "
                f"{words.share} share one threshold: leave {name} out."
            )
    return wanted


def calibrate(
    run: Run,
    wanted: Wanted,
    *,
    data: str | None = None,
    device: str | None = None,
    prior: str | None = None,
) -> Chosen:
    """Choose a policy on the samples that a run set aside, and write it into the run."""
    wanted = settle(wanted, run)
    held_out = hold_out(run, data=data, device=device, prior=prior)
    evidence = evidence_for(wanted.guarantee, held_out.evidence, held_out.data)
    rule = None if wanted.rule is None else lambda logits: make_policies(wanted, logits)
    timed = profile = promise = None
    if wanted.timing is not None:
        timed, profile = _choose_by_the_clock(held_out, wanted, wanted.timing)
        chosen: Calibration[Any] = timed.chosen
    elif wanted.guarantee is not None:
        finds = not wanted.is_fitted and run.recipe is not None  # own data may have no train
        finding = find_on_train(held_out, data=data) if finds else None
        chosen = calibrate_with_guarantee(evidence, rule=rule, finding=finding, **wanted.risk_limit)
        promise = _promise(chosen, held_out, "train" if finding else held_out.data["split"])
    else:
        chosen = choose_policy(evidence, rule=rule, **wanted.target)
    about = describe_choice(wanted, held_out.data, chosen, promise, evidence)
    write_policy(run.folder, chosen.policy, calibration=about)
    known: Any = held_out.evidence
    described = None
    if temperatures := getattr(chosen.policy, "temperatures", None):
        reached_KN = reached_under(known, chosen.policy)
        described = describe_temperatures(known, temperatures, reached_KN=reached_KN)
    return Chosen(
        calibration=chosen,
        num_samples=len(held_out.batches),
        about=about,
        doubt=known.doubt(Asked.from_record(about)),
        temperatures=described,
        timed=timed,
        profile=profile,
    )


def _promise(chosen: Calibration[Any], held_out: HeldOut, found_on: str) -> dict[str, Any]:
    assert chosen.guarantee is not None
    words = family_of(held_out.run.network).words
    sentence = chosen.guarantee.sentence(
        held_out.population, way=words.way, last=words.whole_network
    )
    return asdict(chosen.guarantee) | {"sentence": sentence, "found_on": found_on}


def make_policies(wanted: Wanted, logits: ExitLogits) -> tuple[ThresholdedPolicy, ...]:
    """Make the policies whose thresholds are to be chosen, fitted where they need samples."""
    assert wanted.rule is not None  # settled
    _CHECK_RULE[logits.outputs.name](wanted)
    if wanted.patience is not None:
        return (_patient(wanted.patience, wanted.rule, logits),)
    policies = logits.policies(rule_named(wanted.rule))
    if wanted.pixel_threshold is not None:
        policies = (_with_pixel_threshold(policies[0], wanted.pixel_threshold),)
    if wanted.temperatures is None:
        return policies
    return tuple(_tempered(wanted, logits, policy) for policy in policies)


def _patient(patience: int, rule: str, logits: ExitLogits) -> PatiencePolicy:
    if patience >= logits.costs.num_exits:
        raise InvalidArgumentError(
            f"--patience must be below the network's {logits.costs.num_exits} exits, or "
            f"nobody can leave early. Got {patience}."
        )
    return PatiencePolicy(patience, logits.costs.num_exits, rule=rule)


def _tempered(wanted: Wanted, logits: ExitLogits, policy: ThresholdedPolicy) -> ThresholdedPolicy:
    if not policy.takes_temperatures:
        raise InvalidArgumentError(
            f"--temperatures do not change what --rule {wanted.rule} goes by: leave them out."
        )
    of_all = fit_temperatures(logits)
    tempered = _with(policy, temperatures=of_all)
    if wanted.temperatures == "all":
        return tempered
    # Who survives depends on the thresholds, and those on the temperatures: one round of both.
    chosen = choose_policy(logits, rule=tempered, **wanted.target).policy
    reached_KN = reached_under(logits, chosen)
    of_survivors = fit_temperatures(logits, reached_KN=reached_KN)
    temperatures = tuple(
        own if count >= _LEAST_SURVIVORS else common
        for own, common, count in zip(of_survivors, of_all, reached_KN.sum(1), strict=True)
    )
    return _with(policy, temperatures=temperatures)


def _with(policy: Any, **fields: Any) -> ThresholdedPolicy:
    """Change fields of a policy, whatever its kind."""
    changed: ThresholdedPolicy = replace(policy, **fields)
    return changed


def _check_rule_of_labels(wanted: Wanted) -> None:
    if wanted.pixel_threshold is not None:
        raise InvalidArgumentError(
            "--pixel-threshold is for networks that say a class for every pixel. This one "
            "says one for a sample: leave it out."
        )


def _check_rule_of_maps(wanted: Wanted) -> None:
    if wanted.patience is not None or wanted.rule == LEARNED:
        raise InvalidArgumentError(
            "--patience and --rule learned are about one class a sample. This network says one "
            "for every pixel: use --rule agreement for exits that agree."
        )


_CHECK_RULE = {LABELS.name: _check_rule_of_labels, MAPS.name: _check_rule_of_maps}
"""By outputs, what raises InvalidArgumentError if the rule is for others."""


def _with_pixel_threshold(policy: ThresholdedPolicy, threshold: float) -> ThresholdedPolicy:
    if "pixel_threshold" not in policy.number_names:
        raise InvalidArgumentError(
            "--pixel-threshold is for --rule pixel_share, which counts them."
        )
    return _with(policy, pixel_threshold=threshold)


def _choose_by_the_clock(
    held_out: HeldOut, wanted: Wanted, timing: Timing
) -> tuple[LatencyCalibration, Profile]:
    """Time the parts, keep the times in profile.json, and choose by them."""
    if wanted.max_drop is not None:  # refused before the parts are timed
        check_risk("accuracy_gap", wanted.max_drop, name="max_drop")
    logits: Any = held_out.evidence
    policies = make_policies(wanted, logits)
    profile = _time_parts(held_out, policies[0], timing)
    how: dict[str, Any] = {"batch_size": timing.batch_size, "rule": lambda _: policies}
    if wanted.budget_ms is not None:
        found = calibrate_to_milliseconds(logits, profile, budget_ms=wanted.budget_ms, **how)
    else:
        assert wanted.max_drop is not None  # the command asked for one of the two
        found = calibrate_for_latency(logits, profile, max_drop=wanted.max_drop, **how)
    write_json(held_out.run.folder / PROFILE_FILE, profile.to_dict())
    return found, profile


def _time_parts(held_out: HeldOut, policy: ThresholdedPolicy, timing: Timing) -> Profile:
    network, batch_size = held_out.run.multi_exit, timing.batch_size
    check_batch_sizes([batch_size], num_samples=len(held_out.batches))
    inputs, _ = held_out.batches.__getitems__(list(range(batch_size)))
    asks = policy.with_thresholds((math.inf,) * (policy.num_exits - 1))
    if timing.backend == "torch":
        on_device = inputs.to(held_out.device)
        return profile_network(network, asks, on_device, batch_size=batch_size)
    return profile_exported(network.cpu(), asks, inputs, batch_size=batch_size)


def set_by_hand(run: Run, thresholds: str, wanted: Wanted) -> ThresholdedPolicy | RoutingPolicy:
    """Write thresholds into a run: numbers or "off", separated by commas; or the only one."""
    wanted = settle(wanted, run)
    asked: dict[str, Any] = {"thresholds": thresholds}
    policy: ThresholdedPolicy | RoutingPolicy
    if wanted.rule is None:
        policy = _steered_by_hand(run, thresholds)
    else:
        outputs = run.network.outputs
        asked |= {name: getattr(wanted, name) for name in RULES[outputs.name].fields}
        values = read_thresholds(thresholds, run.network.num_exits)
        policy = _BY_HAND[outputs.name](run, thresholds, values, wanted)
    write_policy(run.folder, policy, calibration={"asked": asked, "data": None, "reached": None})
    return policy


def _steered_by_hand(run: Run, threshold: str) -> RoutingPolicy:
    family = family_of(run.network)
    try:
        policy: RoutingPolicy = family.policy(float(threshold))
    except ValueError as error:
        raise InvalidArgumentError(
            f"Expected one number in [0, 1] for --thresholds: the {family.words.share} of "
            f"{run.folder} share it. Got {threshold!r}."
        ) from error
    return policy


def _labels_by_hand(
    run: Run, text: str, values: tuple[float, ...], wanted: Wanted
) -> ThresholdedPolicy:
    assert wanted.rule is not None  # settled
    _check_rule_of_labels(wanted)
    if wanted.rule != "entropy_nats":
        return ThresholdPolicy(values, rule=wanted.rule)
    num_classes = run.num_classes or int(run.require_recipe().network_options["num_classes"])
    return ThresholdPolicy(
        tuple(
            value if word == "off" else confidence_from_entropy_nats(value, num_classes)
            for word, value in zip(text.split(","), values, strict=True)
        )
    )


def _maps_by_hand(
    run: Run, text: str, values: tuple[float, ...], wanted: Wanted
) -> ThresholdedPolicy:
    assert wanted.rule is not None  # settled
    policy = dense_policy(wanted.rule, values)
    if wanted.pixel_threshold is not None:
        policy = _with_pixel_threshold(policy, wanted.pixel_threshold)
    return policy


_BY_HAND = {LABELS.name: _labels_by_hand, MAPS.name: _maps_by_hand}
"""By outputs, what makes a policy of thresholds, which are given as they were written too."""
