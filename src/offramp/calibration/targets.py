"""Targets that a policy is chosen for, and errors for targets out of reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import numpy as np

from offramp.calibration.chosen import Calibration
from offramp.calibration.risk import check_risk
from offramp.calibration.search import Floats
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

    def score(self, worth_J: Floats, macs_J: Floats, *, plain_macs: int) -> Floats:
        """Score candidates by mean worth and mean MACs; -inf for those beyond the budget."""
        is_allowed_J = macs_J <= self.macs * (1 + 1e-12)  # a weighted mean is rounded
        # A trace of cost prefers the cheaper of equally accurate candidates.
        return np.where(is_allowed_J, worth_J - 1e-9 * macs_J / plain_macs, -np.inf)

    def rank(self, chosen: Calibration[Any]) -> tuple[float, float]:
        """Order what several policies reached: the best comes first."""
        return -chosen.quality, chosen.mean_macs

    def out_of_reach(self, *, worth: float, macs: float, where: str) -> InfeasibleTargetError:
        """Say what the least budget is."""
        return InfeasibleTargetError(
            f"The 'budget_macs' parameter must be at least {math.ceil(macs):,}, the "
            f"cheapest there is on these samples. Got {self.macs:,.0f}.",
            best_achievable=macs,
        )


@dataclass(frozen=True)
class RiskLimit:
    """Spend least while a risk is within a limit.

    Attributes:
        risk: Its name.
        most: The limit, a fraction in [0, 1).
        whole: Worth without the risk, of which so much may be lost.
    """

    risk: str
    most: float
    whole: float = 0.0

    def score(self, worth_J: Floats, macs_J: Floats, *, plain_macs: int) -> Floats:
        """Score candidates as a budget does; -inf for those that are worth too little."""
        return np.where(worth_J >= self.whole - self.most - 1e-12, -macs_J, -np.inf)

    def rank(self, chosen: Calibration[Any]) -> tuple[float, float]:
        """Order what several policies reached: the best comes first."""
        return chosen.mean_macs, -chosen.quality

    def out_of_reach(self, *, worth: float, macs: float, where: str) -> InfeasibleTargetError:
        """Say what the least risk is, which is minus the highest worth."""
        return InfeasibleTargetError(
            f"The risk {self.risk!r} must be allowed to reach {rounded_up(-worth)}, the lowest of "
            f"{where} on these samples. Got {self.most}.",
            best_achievable=-worth,
        )


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
