"""Thresholds with a promise: the true risk is within a target, with a stated probability.

Samples that do not test, a part of the calibration samples or others, find a front of policies from
dear to cheap (Pareto testing). The rest of the calibration samples, or all, test these one after
the other, each at the full level, until the first fails (fixed sequence): the last that passed is
chosen. Since the order was fixed without the samples that test, the chance of choosing any policy
whose true risk is above the target is at most one minus the guarantee.

References: Angelopoulos et al. (2021), Learn then Test; Laufer-Goldshtein et al. (2023),
Efficiently controlling multiple risks with Pareto testing; Angelopoulos et al. (2022), Conformal
risk control; Jazbec et al. (2024), Fast yet Safe, for one shared threshold.

Shapes: ``N`` samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import repeat
from numbers import Real

import numpy as np

from offramp.calibration.chosen import Calibration, P
from offramp.calibration.chosen import Guarantee as Guarantee
from offramp.calibration.evidence import Evidence, require_evidence
from offramp.calibration.risk import check_risk, check_risk_fits
from offramp.calibration.rules import Rule
from offramp.calibration.search import Floats
from offramp.calibration.sequence import (
    check_disjoint,
    choose_test,
    in_random_order,
    part_samples,
    passing_values,
)
from offramp.calibration.targets import RiskLimit
from offramp.errors import InvalidArgumentError


def calibrate_with_guarantee(
    logits: Evidence[P],
    *,
    max_risk: float,
    risk: str = "accuracy_gap",
    guarantee: float | str = 0.95,
    rule: Rule | None = None,
    finding: Evidence[P] | None = None,
    seed: int = 0,
) -> Calibration[P]:
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
        logits: Every exit's logits on held-out data; or a sweep over the thresholds of gates or
            tokens, which were not chosen on it. Their order is known before any sample is seen:
            all of them test, unless the test sizes its bets on some.
        max_risk: The target, a fraction in (0, 1), e.g. 0.01.
        risk: What it bounds: accuracy_gap (against the final exit), disagreement (with it), error
            or brier_gap; pixel_error_gap where every pixel has a class.
        guarantee: Probability in (0, 1) with which it shall hold; or "mean": the risk is within
            the target on average over many draws of the samples (conformal risk control). Where a
            set number was drawn from each class, that is so but approximately: a new sample is
            then not exchangeable with these.
        rule: As for :func:`~offramp.calibrate`; what makes a policy is given the samples that
            find the front. A policy must not have been fitted on any of the samples that test.
        finding: The same of other samples, which find the front or size the bets, so that all of
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
    require_evidence(logits, *([] if finding is None else [finding]))
    check_risk_fits(risk, logits)
    logits.require_independent()
    if finding is not None:
        finding.check_same_network(logits)
        check_disjoint(finding, logits)
    needs_finding = not logits.has_fixed_candidates
    if not needs_finding:
        needs_finding = choose_test(risk, logits, guarantee=guarantee).needs_finding
    testing = logits
    if not needs_finding:
        finding = None
    elif finding is None:
        finding, testing = part_samples(logits, seed)
    else:
        testing = logits.take(in_random_order(logits, seed))
    source = logits if finding is None else finding
    candidates = source.safest_first(source.policies(rule), RiskLimit(risk, max_risk))
    test = choose_test(risk, testing, guarantee=guarantee)
    nothing: Iterable[Floats] = repeat(np.empty(0))
    found = nothing if finding is None else finding.losses(candidates, risk)
    losses = zip(found, testing.losses(candidates, risk), strict=False)
    passed = passing_values(test, losses, max_risk, num_samples=len(logits.labels_N))
    promise = Guarantee(
        risk=risk,
        max_risk=max_risk,
        probability=None if isinstance(guarantee, str) else guarantee,
        method=test.method,
        value=passed[-1],
        num_samples=len(logits.labels_N),
        num_tested=len(testing.labels_N),
        num_finding=0 if finding is None else len(finding.labels_N),
        effective_num_samples=testing.effective_num_samples,
        num_candidates=len(candidates),
        num_passed=len(passed),
    )
    chosen = logits.measure(candidates[len(passed) - 1])
    return replace(chosen, guarantee=promise, candidates=tuple(candidates))


def check_guarantee(max_risk: float, guarantee: float | str) -> None:
    """Refuse a promise that cannot be meant."""
    if max_risk == 0:
        raise InvalidArgumentError(
            "A guarantee needs a target above 0: no number of samples shows that nothing is lost."
        )
    if guarantee != "mean" and not (isinstance(guarantee, Real) and 0 < guarantee < 1):
        raise InvalidArgumentError(
            "The 'guarantee' parameter must be a probability in (0, 1), e.g. 0.95, or 'mean'. "
            f"Got {guarantee!r}."
        )
