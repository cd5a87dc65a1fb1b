"""Evidence that a bundle gives: answers, confidences and costs of its own graphs, without torch.

Shapes: ``K`` steps or thresholds, ``N`` samples, ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from offramp.calibration.logits import ExitLogits
from offramp.calibration.rules import Rule
from offramp.calibration.search import Floats
from offramp.calibration.sweep import Sweep
from offramp.data.arrays import in_arrays
from offramp.data.label_range import check_labels
from offramp.errors import DataError
from offramp.measure.arrays import as_array
from offramp.measure.exit_costs import ExitCosts
from offramp.policy.as_dict import policy_from_dict
from offramp.policy.policies import ThresholdedPolicy
from offramp.policy.routing_policy import RoutingPolicy
from offramp.runtime import Bundle, Session, with_routing_threshold, with_thresholds
from offramp.runtime.session import check_inputs
from offramp.runtime.step_macs import Measured, StepMacs

Array = npt.NDArray[Any]
Batches = Iterable[tuple[tuple[Array, ...], Array]]
"""Inputs and labels."""

_FINEST = 2**20
"""Confidences that find candidates are rounded to this part, below which processors differ."""


@dataclass(frozen=True, kw_only=True)
class StepLogits(ExitLogits):
    """Logits of every step of a bundle, and the confidences that its graphs compute.

    Attributes:
        confidence_KN: Of each step, shape (K, N); NaN where a sample may not leave.
        decided_by: The policy in the graphs, whatever its thresholds.
    """

    tensors_KN: ClassVar[tuple[str, ...]] = ("logits_KNC", "confidence_KN")

    confidence_KN: Floats
    decided_by: ThresholdedPolicy

    def policies(self, rule: Rule | None) -> tuple[ThresholdedPolicy, ...]:
        """The policy of the graphs where no other is named."""
        return super().policies(self.decided_by if rule is None else rule)

    def known_confidences(self, policy: ThresholdedPolicy, off: frozenset[int]) -> Floats | None:
        """Confidences of the graphs, where the policy is theirs; its steps run, on or off."""
        own = self.decided_by
        if type(policy) is not type(own) or policy.with_thresholds(own.thresholds) != own:
            return None
        known_KN = self.confidence_KN.copy()
        known_KN[sorted(off)] = np.nan
        return known_KN

    def rounded(self) -> Self:
        """Leave out the last bits of confidences too."""
        confidence_KN = np.rint(self.confidence_KN * _FINEST) / _FINEST
        return replace(super().rounded(), confidence_KN=confidence_KN)


def collect_steps(session: Session, data: object, *, batch_size: int = 256) -> ExitLogits:
    """Run every step of a bundle on every sample of a data set, letting nobody leave.

    Of a network that one threshold steers: its only exit, where most runs.
    """
    return logits_of_batches(session, in_arrays(data, batch_size=batch_size))


def logits_of_batches(session: Session, batches: Batches) -> ExitLogits:
    """Run every step of a bundle on batches of arrays, as :func:`collect_steps` does."""
    bundle = session.bundle
    policy: Any = policy_from_dict(dict(bundle.policy))
    has_one_threshold = isinstance(policy, RoutingPolicy)
    if has_one_threshold:
        session = Session(with_routing_threshold(bundle, policy.tried[-1]))
    else:
        session = Session(with_thresholds(bundle, [0.0] * (len(bundle.steps) - 1)))
    macs, outputs, labels, confidences = _BundleMacs(session, policy), [], [], []
    for inputs, labels_B in batches:
        said_KBC, confidence_KB = (_only_exit if has_one_threshold else _every_exit)(
            session, inputs
        )
        check_said(said_KBC, labels_B)
        outputs.append(said_KBC)
        confidences.append(confidence_KB)
        labels.append(labels_B)
        macs.add(inputs)
    if not labels:
        raise DataError("Expected at least one batch of samples to collect logits from. Got none.")
    about: dict[str, Any] = {
        "costs": macs.costs(),
        "numbers": (0,) if has_one_threshold else tuple(step.exit_index for step in bundle.steps),
        "is_ragged": bundle.padding is not None,
    }
    if outputs[0].ndim == 5:  # a class for every pixel, which torch counts
        from offramp.calibration.collect import dense_logits

        return dense_logits(outputs, labels, **about)
    about |= {"logits_KNC": np.concatenate(outputs, axis=1), "labels_N": np.concatenate(labels)}
    decided_by = None if has_one_threshold else policy_of_steps(bundle, policy)
    if decided_by is None:
        return ExitLogits(**about)
    confidence_KN = np.concatenate(confidences, axis=1)
    return StepLogits(**about, confidence_KN=confidence_KN, decided_by=decided_by)


def policy_of_steps(bundle: Bundle, policy: Any) -> ThresholdedPolicy | None:
    """The policy over the steps of a bundle, nobody leaving: exits that are off have no step.

    None where one that goes by earlier exits was exported without some of them.
    """
    exits = [step.exit_index for step in bundle.steps]
    kept: dict[str, Any] = {"thresholds": (math.inf,) * (len(exits) - 1)}
    if len(exits) < policy.num_exits:
        if not policy.takes_temperatures:
            return None
        if policy.temperatures is not None:
            kept["temperatures"] = tuple(policy.temperatures[k] for k in exits)
    made: ThresholdedPolicy = replace(policy, **kept)
    return made


def sweep_session(session: Session, data: object, *, batch_size: int = 256) -> Sweep:
    """Run a bundle that skips blocks or drops tokens at each of the thresholds that are tried."""
    bundle = session.bundle
    policy: Any = policy_from_dict(dict(bundle.policy))
    sessions = [Session(with_routing_threshold(bundle, each)) for each in policy.tried]
    outputs, macs, plain_macs, labels = [], [], [], []
    for inputs, labels_B in in_arrays(data, batch_size=batch_size):
        results = [each.run(*inputs) for each in sessions]
        outputs.append(np.stack([result.output for result in results]))
        check_said(outputs[-1], labels_B)
        macs.append(np.stack([result.macs for result in results]))
        plain_macs.append(session.plain_macs(*inputs))
        labels.append(labels_B)
    if not labels:
        raise DataError("Expected at least one batch of samples to run. Got none.")
    return Sweep(
        logits_KNC=np.concatenate(outputs, axis=1),
        labels_N=np.concatenate(labels),
        thresholds=policy.tried,
        macs_KN=np.concatenate(macs, axis=1),
        plain_macs=round(float(np.concatenate(plain_macs).mean())),
        policy=type(policy),
        is_ragged=bundle.padding is not None,
    )


def check_said(outputs_KBC: Any, labels_B: Any) -> None:
    """Refuse labels without an output, and what is not a number."""
    check_labels(labels_B, num_classes=outputs_KBC.shape[2])
    if np.isnan(as_array(outputs_KBC)).any():
        raise DataError(
            "Expected logits that are numbers. The network says NaN of a sample: check that "
            "its weights and inputs are finite."
        )


def _every_exit(session: Session, inputs: Sequence[Array]) -> tuple[Array, Floats]:
    """Logits of every step, and confidences of the samples that may leave there."""
    carried: list[Any] = check_inputs(session.bundle, inputs)
    outputs, confidences = [], []
    for index in range(len(session.bundle.steps)):
        _, (output, confidence_B, may_leave_B, *carried) = session.run_step(index, carried)
        outputs.append(output)
        confidences.append(np.where(may_leave_B, confidence_B, np.nan).astype(np.float64))
    return np.stack(outputs), np.stack(confidences)


def _only_exit(session: Session, inputs: Sequence[Array]) -> tuple[Array, Floats]:
    result = session.run(*inputs)
    return result.output[None], result.confidence[None].astype(np.float64)


class _BundleMacs:
    """Costs of a bundle's parts for the mean of some samples, each of its own length."""

    def __init__(self, session: Session, policy: Any) -> None:
        self._session = session
        self._policy = policy
        self._steps = StepMacs(session.bundle) if session.bundle.family == "exits" else None
        self._measured: list[Measured] = []

    def add(self, inputs: Sequence[Array]) -> None:
        if self._steps is None:
            self._measured.append(self._session.plain_macs(*inputs))
        else:
            self._measured.append(self._steps.trim(check_inputs(self._session.bundle, inputs))[1])

    def costs(self) -> ExitCosts:
        bundle = self._session.bundle
        if self._steps is None:
            plain_macs = round(float(np.concatenate(self._measured).mean()))
            return ExitCosts(stage_macs=(plain_macs,), head_macs=(0,))
        is_ragged = bundle.padding is not None
        mean = self._steps.mean(np.concatenate(self._measured) if is_ragged else self._measured[-1])
        # Without what its own policy takes to decide: others are to be measured too.
        heads = zip(bundle.steps, mean.heads, strict=True)
        return ExitCosts(
            stage_macs=mean.stages,
            head_macs=tuple(macs - self._policy.macs(step.exit_index) for step, macs in heads),
        )
