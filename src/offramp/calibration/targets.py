"""What a policy is chosen for, and what is said where that cannot be reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeVar

from offramp.calibration.risk import check_risk
from offramp.errors import InfeasibleTargetError, InvalidArgumentError
from offramp.policy.policies import ThresholdedPolicy

_Reached = TypeVar("_Reached")

QUALITY_GAP = "quality_gap"
"""Names what ``max_drop`` limits where it is no mean over samples: the mean IoU that is lost."""


@dataclass(frozen=True)
class Budget:
    """Be most accurate within so many mean MACs per sample.

    Attributes:
        macs: As many; finite.
    """

    macs: float


@dataclass(frozen=True)
class RiskLimit:
    """Spend least while a risk is within a limit.

    Attributes:
        risk: Its name.
        most: The limit, a fraction in [0, 1).
    """

    risk: str
    most: float


def as_target(
    *,
    max_drop: float | None = None,
    max_risk: float | None = None,
    risk: str,
    budget_macs: float | None = None,
    budget_share: float | None = None,
    plain_macs: int,
    drop: str = "accuracy_gap",
) -> Budget | RiskLimit:
    """Read the target from what ``calibrate`` was given."""
    if sum(given is not None for given in (max_drop, max_risk, budget_macs, budget_share)) != 1:
        raise InvalidArgumentError(
            "Give exactly one target: 'max_drop', 'max_risk', 'budget_macs' or 'budget_share'."
        )
    if budget_macs is not None:
        if not isinstance(budget_macs, Real):
            raise InvalidArgumentError(
                f"The 'budget_macs' parameter must be a number. Got {budget_macs!r}."
            )
        if budget_macs == math.inf:
            raise InvalidArgumentError(
                "The 'budget_macs' parameter must be finite. Got inf: for the most accurate "
                "thresholds, give the plain network's MACs."
            )
        return Budget(budget_macs)
    if budget_share is not None:
        if not (isinstance(budget_share, Real) and 0 < budget_share < math.inf):
            raise InvalidArgumentError(
                "The 'budget_share' parameter must be a share of the plain network's MACs above "
                f"0, e.g. 0.5. Got {budget_share!r}."
            )
        return Budget(budget_share * plain_macs)
    if max_drop is not None:
        check_risk("accuracy_gap", max_drop, name="max_drop")
        return RiskLimit(drop, max_drop)
    assert max_risk is not None  # one of four is given
    check_risk(risk, max_risk)
    return RiskLimit(risk, max_risk)


def budget_too_low(budget_macs: float, *, cheapest_macs: float) -> InfeasibleTargetError:
    """Say what the least budget is."""
    return InfeasibleTargetError(
        f"The 'budget_macs' parameter must be at least {math.ceil(cheapest_macs):,}, the "
        f"cheapest there is on these samples. Got {budget_macs:,.0f}.",
        best_achievable=cheapest_macs,
    )


def risk_too_low(limit: RiskLimit, *, lowest: float, where: str) -> InfeasibleTargetError:
    """Say what the least risk is."""
    return InfeasibleTargetError(
        f"The risk {limit.risk!r} must be allowed to reach {rounded_up(lowest)}, the lowest of "
        f"{where} on these samples. Got {limit.most}.",
        best_achievable=lowest,
    )


def rounded_up(target: float) -> str:
    """A target with four digits that is not below the given one, so that it can be asked for."""
    return f"{math.ceil(target * 1e4) / 1e4:.4f}"


def feasible(
    policies: Sequence[ThresholdedPolicy], reach: Callable[[ThresholdedPolicy], _Reached]
) -> list[_Reached]:
    """Results of the policies that can keep to a target."""
    reached, refusals = [], []
    for policy in policies:
        try:
            reached.append(reach(policy))
        except InfeasibleTargetError as error:
            refusals.append(error)
    if not reached:
        raise min(refusals, key=lambda error: error.best_achievable)
    return reached
