"""Wishes for a policy, checked, and the policy chosen: the same for a run and a bundle."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from offramp.calibration.chosen import Calibration
from offramp.calibration.evidence import Evidence, ordered_front
from offramp.calibration.guarantee import check_guarantee
from offramp.calibration.latency import LatencyCalibration
from offramp.calibration.risk import PIXEL_ERROR_GAP, check_risk
from offramp.calibration.rules import Rule
from offramp.calibration.targets import RiskLimit
from offramp.calibration.temperature import ExitCalibration
from offramp.errors import InvalidArgumentError
from offramp.measure.outputs import LABELS, MAPS
from offramp.measure.profile import Profile
from offramp.policy.dense_policies import DensePolicy
from offramp.policy.policies import PatiencePolicy
from offramp.policy.rules import RULES
from offramp.workflow.wanted import LEARNED, Wanted


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A policy that a run was given, and how it came about.

    Attributes:
        calibration: The policy and what it reached on the samples set aside.
        num_samples: As many as these are.
        about: What the policy file says of the choice.
        doubt: Why so few samples cannot tell; None where they can.
        temperatures: What those of the policy do to each exit; None without.
        timed: What was predicted of times; None without a clock.
        profile: The times; None without a clock.
    """

    calibration: Calibration[Any]
    num_samples: int
    about: dict[str, Any]
    doubt: str | None
    temperatures: tuple[ExitCalibration, ...] | None
    timed: LatencyCalibration | None
    profile: Profile | None


def rule_named(name: str) -> Rule:
    """Find the rule of a name, a confidence function or ``LEARNED``, as the library takes it."""
    if name == LEARNED:
        from offramp.calibration.controller import fit_controller

        return fit_controller
    of_samples, of_pixels = (*RULES[LABELS.name].names, LEARNED), RULES[MAPS.name].names
    if name not in (*of_samples, *of_pixels):
        raise InvalidArgumentError(
            f"The rule must be one of {', '.join(of_samples)}; of {', '.join(of_pixels)} where the "
            f"network says a class for every pixel. Got {name!r}."
        )
    return name


def check_wanted(wanted: Wanted) -> None:
    """Raise InvalidArgumentError if no data can make a value good, before any is read."""
    for name, value in (("max_drop", wanted.max_drop), ("max_risk", wanted.max_risk)):
        if value is not None:
            check_risk(wanted.risk_name, value, name=name)
            if wanted.guarantee is not None:
                check_guarantee(value, wanted.guarantee)
    rule_named(wanted.rule or "entropy")
    if wanted.pixel_threshold is not None:
        DensePolicy((), pixel_threshold=wanted.pixel_threshold)
    if wanted.patience is not None:
        PatiencePolicy(wanted.patience, num_exits=wanted.patience + 1)


def describe_choice(
    wanted: Wanted,
    data: dict[str, Any],
    chosen: Calibration[Any],
    promise: dict[str, Any] | None,
    evidence: Evidence[Any],
) -> dict[str, Any]:
    """Describe how a policy was chosen, as policy files and bundles keep it."""
    risk = wanted.risk or ("accuracy_gap" if evidence.outputs is LABELS else PIXEL_ERROR_GAP)
    limit = RiskLimit(risk, wanted.max_risk or wanted.max_drop or 0.0)
    front = asdict(ordered_front(evidence, chosen, limit))
    for point in front["points"]:
        if point["mean_iou"] is None:
            del point["mean_iou"]
    reached = {"accuracy": chosen.accuracy, "mean_macs": chosen.mean_macs}
    if chosen.mean_iou is not None:
        reached["mean_iou"] = chosen.mean_iou
    return {"asked": wanted.to_dict(), "data": data, "reached": reached, "guarantee": promise} | {
        "front": front
    }


def read_thresholds(text: str, num_exits: int) -> tuple[float, ...]:
    """Read thresholds, one per exit but the last, separated by commas; "off" is infinite."""
    try:
        values = [math.inf if part == "off" else float(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgumentError(
            f"Expected numbers separated by commas for --thresholds. Got {text!r}."
        ) from error
    if len(values) != num_exits - 1:
        raise InvalidArgumentError(
            f"Expected {num_exits - 1} thresholds, one per exit but the final one. "
            f"Got {len(values)}: {text!r}."
        )
    return tuple(values)
