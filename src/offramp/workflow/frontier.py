"""Accuracy against cost of runs and bundles: chosen on calibration data, judged on test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offramp.calibration.frontier import Frontier, check_num_points
from offramp.calibration.frontier import frontier as measure
from offramp.calibration.temperature import (
    ExitCalibration,
    describe_temperatures,
    fit_temperatures,
)
from offramp.errors import InSampleError, InvalidArgumentError
from offramp.policy.as_dict import policy_to_dict
from offramp.policy.rules import RULES
from offramp.runtime.answers import rule_in_words
from offramp.runtime.bundle import is_bundle
from offramp.runtime.chosen_on import CALIBRATION_SPLIT
from offramp.workflow.artifact import Opened, open_artifact
from offramp.workflow.chosen import rule_named
from offramp.workflow.samples import CALIBRATION


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The part of the plot that is one run's.

    Attributes:
        run: The run.
        rule: How sure an exit is; None without exits.
        frontier: Its points.
        reliability: Of each exit, temperatures fitted on calibration data and judged on test;
            None without calibration data or exits.
        num_samples: That judged.
        num_calibration_samples: That chose the thresholds.
        fingerprint: Identifies the samples that judged.
        split: That they are of.
    """

    run: Opened
    rule: str | None
    frontier: Frontier
    reliability: tuple[ExitCalibration, ...] | None
    num_samples: int
    num_calibration_samples: int
    fingerprint: str
    split: str

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON."""
        reliability = None if self.reliability is None else [r.to_dict() for r in self.reliability]
        return {
            "run": self.run.name,
            "recipe": self.run.recipe,
            "num_samples": self.num_samples,
            "num_calibration_samples": self.num_calibration_samples,
            **self.frontier.to_dict(),
            "reliability": reliability,
        }


def check_asked(split: str | None, num_points: int, rule: str | None) -> None:
    """Refuse what needs no data to be refused."""
    if split in ("train", CALIBRATION_SPLIT):
        raise InSampleError(
            f"The samples of {split} train the runs or choose their thresholds: a curve on them "
            "would be too good. Use --split test."
        )
    check_num_points(num_points)
    if rule is not None:
        rule_named(rule)


def open_all(
    folders: Sequence[Path], device: str | None = None, network: str | None = None
) -> list[Opened]:
    """Open runs and bundles of one data set, and refuse others."""
    opened = [_open(folder, device, network) for folder in folders]
    first, *others = opened
    for run in others:
        if run.samples.name != first.samples.name:
            raise InvalidArgumentError(
                "Expected runs of one data set: curves on different data do not belong in one "
                f"plot. Got {first.name} on {first.samples.name} and {run.name} on "
                f"{run.samples.name}."
            )
    return opened


def _open(folder: Path, device: str | None, named: str | None) -> Opened:
    if is_bundle(folder):
        bundle = open_artifact(folder, device, named)
        return replace(bundle, name=str(folder))
    from offramp.workflow.opened_run import open_uncalibrated  # torch

    return open_uncalibrated(folder, device, named)


def follow(
    run: Opened,
    split: str | None = None,
    *,
    data: str | None = None,
    subset: int | None = None,
    num_points: int = 10,
    rule: str | None = None,
) -> Curve:
    """Collect what the network says on both splits, and choose on the one for the other."""
    calibration: Any = None
    held_out = None
    reliability = None
    has_one_threshold = run.thresholds is not None
    if run.num_exits > 1 or has_one_threshold or run.samples.has_calibration:
        held_out = run.samples.load(data=data, subset=subset, preferred=CALIBRATION)
        calibration = run.collect(held_out.batches)
    judging = run.samples.load(split, data=data, subset=subset)
    if held_out is not None and held_out.fingerprint == judging.fingerprint:
        raise InSampleError(
            f"The split {judging.split} would choose thresholds and judge them. Give data of two "
            f"splits, one of them {' or '.join(CALIBRATION)}."
        )
    test: Any = run.collect(judging.batches)
    asked = None if has_one_threshold or rule is None else rule_named(rule)
    found = measure(calibration, test, num_points=num_points, rule=asked)
    if calibration is not None and not has_one_threshold:
        reliability = describe_temperatures(test, fit_temperatures(calibration))
    return Curve(
        run=run,
        rule=None if has_one_threshold else rule or _default_rule(test),
        frontier=found,
        reliability=reliability,
        num_samples=len(test.labels_N),
        num_calibration_samples=0 if calibration is None else len(calibration.labels_N),
        fingerprint=judging.fingerprint,
        split=judging.split,
    )


def _default_rule(evidence: Any) -> str:
    """Name the rule by which an exit is sure where none is asked for: of a bundle, its own."""
    decided_by = getattr(evidence, "decided_by", None)
    default: str = RULES[evidence.outputs.name].default
    return default if decided_by is None else rule_in_words(policy_to_dict(decided_by))


def check_same_samples(curves: Sequence[Curve]) -> None:
    """Refuse curves that other samples judged."""
    first, last = curves[0], curves[-1]
    if last.fingerprint != first.fingerprint:
        raise InvalidArgumentError(
            f"Expected one {first.split} split for all runs. Got {first.num_samples:,} samples for "
            f"{first.run.name} and {last.num_samples:,} others for {last.run.name}: give all runs "
            "the same with --data DIR."
        )
