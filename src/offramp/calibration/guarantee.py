"""Thresholds with a promise: the true risk is within a target, with a stated probability.

Samples that do not test, a part of the calibration samples or others, find a front of policies from
dear to cheap (Pareto testing). The rest of the calibration samples, or all, test these one after
the other, each at the full level, until the first fails (fixed sequence): the last that passed is
chosen. Since the order was fixed without the samples that test, the chance of choosing any policy
whose true risk is above the target is at most one minus the guarantee.

References: Angelopoulos et al. (2021), Learn then Test; Laufer-Goldshtein et al. (2023),
Efficiently controlling multiple risks with Pareto testing; Angelopoulos et al. (2022), Conformal
risk control; Jazbec et al. (2024), Fast yet Safe, for one shared threshold.

Shapes: ``K`` exits, ``N`` samples, ``P`` policies on the front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import torch

from offramp.calibration.logits import ExitLogits, check_same_network, require_logits
from offramp.calibration.risk import RISKS, cautious_losses, check_risk, check_risk_fits
from offramp.calibration.rules import Rule, policies_like
from offramp.calibration.search import Floats, exits_left_by
from offramp.calibration.sequence import (
    check_disjoint,
    choose_test,
    in_random_order,
    part_samples,
    passing_values,
)
from offramp.calibration.thresholds import (
    Calibration,
    calibrate,
    confidences,
    costs_under,
    measure_policy,
    plausibility,
    search_for,
)
from offramp.errors import InvalidArgumentError
from offramp.policy.policies import ThresholdedPolicy


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What is promised of a policy, and what it rests on.

    Attributes:
        risk: The risk that is bounded, as ``calibrate`` names it.
        max_risk: The target.
        probability: With which it holds, over the draw of the samples; None where the promise is
            about the mean over many draws.
        method: How it was tested.
        value: The p-value of the policy; for conformal risk control, how far its bound on the mean
            risk is above the target, at most 0.
        num_samples: Calibration samples in all.
        num_tested: Of them, those that tested.
        num_finding: Samples that found the candidates, or sized the bets: the other calibration
            samples, or samples from elsewhere; 0 where none were needed.
        effective_num_samples: What the testing ones amount to after weighting.
        num_candidates: Policies that stood in a row to be tested.
        num_passed: Of them, those that passed before the first that did not.
    """

    risk: str
    max_risk: float
    probability: float | None
    method: str
    value: float
    num_samples: int
    num_tested: int
    num_finding: int
    effective_num_samples: float
    num_candidates: int
    num_passed: int

    def sentence(
        self, population: str, *, way: str = "early exit", last: str = "the final exit"
    ) -> str:
        """The promise in one sentence that a person can quote.

        Args:
            population: What the samples were drawn from.
            way: What answers cheaply.
            last: What it is compared with.
        Returns:
            The sentence.
        """
        what = RISKS[self.risk].in_words(self.max_risk, way, last)
        drawn = f"{self.num_samples:,} calibration samples ({population})"
        if self.probability is None:
            return f"On average over draws of {drawn}, {what} on new samples drawn alike."
        return (
            f"With probability at least {100 * self.probability:g} % over the draw of {drawn}, "
            f"{what} on new samples drawn alike."
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class GuaranteedCalibration(Calibration):
    """A policy with a promise; print it for a table.

    Attributes:
        guarantee: The promise.
    """

    guarantee: Guarantee

    def _lines(self) -> list[tuple[str, str]]:
        return [*super()._lines(), ("promise", self.guarantee.sentence("as they were drawn"))]


def calibrate_with_guarantee(
    logits: ExitLogits,
    *,
    max_risk: float,
    risk: str = "accuracy_gap",
    guarantee: float | str = 0.95,
    rule: Rule | None = None,
    finding: ExitLogits | None = None,
    seed: int = 0,
) -> GuaranteedCalibration:
    """Choose thresholds so that the true risk is within a target, and say with what probability.

    The promise holds for samples drawn independently from where these were drawn from; it breaks
    when the inputs, or the shares of the classes, change. With a prior, the samples of each class
    count as much as it says, and the promise is about a population with that prior; it is then
    conditional on how many samples of each class there are, and tested by a bound for a fixed
    number per class.

    It is valid because everything that shapes or orders the candidates (the front, temperatures,
    the rule, a controller, the first bet) is computed from samples that do not test, or is fixed
    before any data is seen. This holds for inputs too: where no label is used, the samples must
    still be others, since a disagreement depends on inputs alone. A front, a policy or
    temperatures that were computed from the testing samples on an earlier day count as computed
    from them. The network must not have been trained on the testing samples, nor its checkpoint
    chosen by them. The promise covers one call: whoever calls with several seeds, rules or
    networks and keeps the best has no promise.

    Args:
        logits: Every exit's logits on held-out data.
        max_risk: The target, a fraction in (0, 1), e.g. 0.01.
        risk: What it bounds: accuracy_gap (against the final exit), disagreement (with it), error
            or brier_gap; pixel_error_gap where every pixel has a class.
        guarantee: Probability in (0, 1) with which it shall hold; or "mean": the risk is within
            the target on average over many draws of the samples (conformal risk control). Where a
            set number was drawn from each class, that is so but approximately: a new sample is
            then not exchangeable with these.
        rule: As for :func:`~offramp.calibrate`; what makes a policy is given the samples that
            find the front. A policy must not have been fitted on any of the samples that test.
        finding: Every exit's logits on other samples, which find the front, so that all of
            ``logits`` test. They may be samples that trained the network: the front then expects
            too much, but the promise holds. If None, three in ten of ``logits`` find it.
        seed: Parts the samples where ``finding`` is None; also draws the order in which samples
            are bet on, where a test depends on it. The labels in their order take part in the
            draw, the logits never do.
    Returns:
        The policy, what it reached on all samples, and the promise.
    Raises:
        InvalidArgumentError: If an argument is out of range, a promise on average is asked for
            with a prior that weights samples unevenly, or ``finding`` is of another network.
        DataError: If ``finding`` holds samples that test.
        InSampleError: If some of the samples chose the network's checkpoint.
        InfeasibleTargetError: If not even the safest policy passes; says how many samples would
            do, and carries the lowest target that these would allow.
    """
    check_risk(risk, max_risk)
    check_guarantee(max_risk, guarantee)
    require_logits(logits, *([] if finding is None else [finding]))
    check_risk_fits(risk, logits)
    logits.require_independent()
    if finding is None:
        finding, testing = part_samples(logits, seed)
    else:
        check_same_network(finding, logits)
        check_disjoint(finding, logits)
        testing = logits.take(in_random_order(logits, seed))
    candidates = candidates_on(finding, _best_of(rule, finding, max_risk, risk), risk)
    test = choose_test(risk, testing, guarantee=guarantee)
    losses = zip(
        _losses(finding, candidates, risk), _losses(testing, candidates, risk), strict=True
    )
    passed = passing_values(test, losses, max_risk, num_samples=len(logits.labels_N))
    chosen = measure_policy(logits, candidates[len(passed) - 1])
    promise = Guarantee(
        risk=risk,
        max_risk=max_risk,
        probability=None if isinstance(guarantee, str) else guarantee,
        method=test.method,
        value=passed[-1],
        num_samples=len(logits.labels_N),
        num_tested=len(testing.labels_N),
        num_finding=len(finding.labels_N),
        effective_num_samples=testing.effective_num_samples,
        num_candidates=len(candidates),
        num_passed=len(passed),
    )
    return GuaranteedCalibration(**vars(chosen), guarantee=promise)


def check_guarantee(max_risk: float, guarantee: float | str) -> None:
    """Refuse a promise that cannot be meant.

    Args:
        max_risk: The target.
        guarantee: As for :func:`calibrate_with_guarantee`.
    Raises:
        InvalidArgumentError: If the target is 0, or the guarantee no probability and not "mean".
    """
    if max_risk == 0:
        raise InvalidArgumentError(
            "A guarantee needs a target above 0: no number of samples shows that nothing is lost."
        )
    if guarantee != "mean" and not (isinstance(guarantee, Real) and 0 < guarantee < 1):
        raise InvalidArgumentError(
            "The 'guarantee' parameter must be a probability in (0, 1), e.g. 0.95, or 'mean'. "
            f"Got {guarantee!r}."
        )


def _rounded(finding: ExitLogits) -> ExitLogits:
    """Logits without their last bits, which differ between processors: ties then break alike."""
    if finding.is_dense:
        return finding  # at half precision already
    largest = torch.finfo(torch.float16).max
    logits_KNC = finding.logits_KNC.clamp(-largest, largest).half().float()
    return replace(finding, logits_KNC=logits_KNC)


def _best_of(
    rule: Rule | None, finding: ExitLogits, max_risk: float, risk: str
) -> ThresholdedPolicy:
    """The policy to be tested: of several, the one that would save most on what finds it."""
    policies = policies_like(rule, finding)
    if len(policies) == 1:
        return policies[0]
    return calibrate(finding, max_risk=max_risk, risk=risk, rule=lambda _: policies).policy


def candidates_on(
    finding: ExitLogits, policy: ThresholdedPolicy, risk: str
) -> list[ThresholdedPolicy]:
    """Policies on the way from the safest, where nobody leaves, to the cheapest.

    Of right and wrong, a few hundred samples tell little: there, answers are judged by how likely
    the final exit finds them.

    Args:
        finding: Every exit's logits on the samples that find them.
        policy: Their kind; its thresholds do not matter.
        risk: What is to be bounded.
    Returns:
        The policies, in the order in which they are tested.
    """
    finding, counted = _rounded(finding), RISKS[risk]
    worth_KN = plausibility(finding) if counted.counts_errors else -counted.losses(finding)
    search = search_for(
        finding,
        policy,
        worth_KN,
        confidences(finding, policy),
        costs=costs_under(finding, policy),
    )
    return [policy.with_thresholds(thresholds) for thresholds in search.front()]


def _losses(
    logits: ExitLogits, policies: Sequence[ThresholdedPolicy], risk: str
) -> Iterator[Floats]:
    """Loss of every sample under one policy after the other, weights multiplied in."""
    losses_KN = cautious_losses(risk, logits) * logits.weights_N
    for policy, confidence_KN in _with_confidences(logits, policies):
        exit_N = exits_left_by(confidence_KN, policy.thresholds)
        yield losses_KN[exit_N, np.arange(len(exit_N))]


def _with_confidences(
    logits: ExitLogits, policies: Sequence[ThresholdedPolicy]
) -> Iterator[tuple[ThresholdedPolicy, Floats]]:
    """Each policy with its confidences, which policies with the same exits off share."""
    known: dict[frozenset[int], Floats] = {}
    for policy in policies:
        off = policy.off_exits
        if off not in known:
            known[off] = confidences(logits, policy, off)
        yield policy, known[off]
