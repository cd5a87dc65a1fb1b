"""Switching off exits that cost more time than they save, by measured times of the parts.

MACs do not know what it takes to stop and ask: a head that is small in MACs may be slow, and
copying the survivors takes time. So thresholds are chosen for the accuracy target as ever, and
then an exit is switched off, and the others are chosen anew, as long as that makes a batch faster.

Shapes: ``K`` exits, ``N`` samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.calibration.collect import ExitLogits
from offramp.calibration.thresholds import Calibration, calibrate, confidences, exits_left_by
from offramp.errors import InvalidArgumentError, ShapeError
from offramp.measure.profile import Profile
from offramp.policy.policies import ThresholdPolicy

_LEAST_GAIN = 0.005
"""An exit goes if a batch is faster by more than this fraction without it: less is noise."""


@dataclass(frozen=True, kw_only=True)
class SwitchedOff:
    """An exit that did not pay.

    Attributes:
        exit_index: Its number, from 0.
        ms_with: A batch with it, predicted.
        ms_without: A batch without it, the other thresholds chosen anew.
        asking_ms: Of ``ms_with``, what its head, decision and compaction take.
    """

    exit_index: int
    ms_with: float
    ms_without: float
    asking_ms: float


@dataclass(frozen=True, kw_only=True)
class LatencyCalibration:
    """A policy chosen by measured times.

    Attributes:
        chosen: The policy and what it reached on the calibration data.
        switched_off: Exits that did not pay, in the order in which they went.
        batch_ms: A batch with the policy, predicted.
        plain_ms: A batch with every exit but the final one off, predicted.
    """

    chosen: Calibration
    switched_off: tuple[SwitchedOff, ...]
    batch_ms: float
    plain_ms: float


def calibrate_for_latency(
    logits: ExitLogits,
    profile: Profile,
    *,
    batch_size: int,
    max_drop: float,
    rule: str = "entropy",
) -> LatencyCalibration:
    """Choose thresholds for an accuracy target, and switch off exits that do not pay.

    Args:
        logits: Every exit's logits on held-out data.
        profile: Measured times of the same network's parts.
        batch_size: Samples a batch, as the network will be used; at most the largest that was
            timed.
        max_drop: As for :func:`~offramp.calibrate`.
        rule: As for :func:`~offramp.calibrate`.
    Returns:
        The policy, with what was switched off and why.
    Raises:
        InvalidArgumentError: As for :func:`~offramp.calibrate`, or if the batch size was not timed.
        ShapeError: If the profile is of a network with another number of exits.
    """
    num_exits = logits.costs.num_exits
    _check_fits(profile, num_exits=num_exits, batch_size=batch_size)
    confidence_KN = confidences(logits, rule)

    def reaching(policy: ThresholdPolicy) -> list[float]:
        """How many samples of a batch reach each stage, a mean."""
        exit_N = exits_left_by(confidence_KN, policy.thresholds)
        return [batch_size * float(np.mean(exit_N >= k)) for k in range(num_exits)]

    def choose(off: frozenset[int]) -> tuple[float, Calibration]:
        chosen = calibrate(logits, max_drop=max_drop, rule=rule, off=off)
        return profile.batch_ms(reaching(chosen.policy), chosen.policy.off_exits), chosen

    off: frozenset[int] = frozenset()
    batch_ms, chosen = choose(off)
    switched_off = []
    while on := [k for k in range(num_exits - 1) if not chosen.policy.is_off(k)]:
        trials = {k: choose(off | {k}) for k in on}
        k = min(on, key=lambda k: trials[k][0])
        if trials[k][0] > batch_ms * (1 - _LEAST_GAIN):
            break
        switched_off.append(
            SwitchedOff(
                exit_index=k,
                ms_with=batch_ms,
                ms_without=trials[k][0],
                asking_ms=profile.asking_ms(k, reaching(chosen.policy)[k]),
            )
        )
        off, (batch_ms, chosen) = off | {k}, trials[k]
    plain_ms = profile.batch_ms([batch_size] * num_exits, off=range(num_exits - 1))
    return LatencyCalibration(
        chosen=chosen, switched_off=tuple(switched_off), batch_ms=batch_ms, plain_ms=plain_ms
    )


def _check_fits(profile: Profile, *, num_exits: int, batch_size: int) -> None:
    if len(profile.stage_ms) != num_exits:
        raise ShapeError(
            f"Expected a profile of {num_exits} stages. Got one of {len(profile.stage_ms)}."
        )
    if not 1 <= batch_size <= profile.sizes[-1]:
        raise InvalidArgumentError(
            f"The 'batch_size' parameter must be an int in [1, {profile.sizes[-1]}], the sizes "
            f"that were timed. Got {batch_size}."
        )
