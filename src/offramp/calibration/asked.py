"""The target of a policy, to be set against what it then reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offramp.calibration.risk import RISKS
from offramp.tables import Brief, percent, points

TARGETS = ("max_drop", "max_risk", "budget_macs", "budget_share", "budget_ms")
"""Names of targets."""

IN_PYTHON = "calibrate_with_guarantee(), which says how many a promise takes"
"""Advice for few samples, in Python."""

_FINEST = 0.01
"""A target below is a wish for as little as can be, not one to be shown."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Asked(Brief):
    """The target that a policy was chosen for.

    Attributes:
        target: Its name: max_drop, max_risk, budget_macs, budget_share or budget_ms.
        limit: Its value.
        num_samples: Calibration samples that chose the policy.
        risk: What ``max_risk`` bounds; None for the other targets.
        guarantee: Probability with which the limit shall hold, or "mean"; None without a promise.
    """

    target: str
    limit: float
    num_samples: int
    risk: str | None = None
    guarantee: float | str | None = None

    @classmethod
    def from_record(cls, calibration: Mapping[str, Any] | None) -> Asked | None:
        """Read what ``policy.json`` says of the choice."""
        asked, data = ((calibration or {}).get(name) for name in ("asked", "data"))
        if not isinstance(asked, Mapping) or not isinstance(data, Mapping):
            return None
        target = next((name for name in TARGETS if asked.get(name) is not None), None)
        if target is None or "num_samples" not in data:
            return None
        return cls(
            target=target,
            limit=float(asked[target]),
            num_samples=int(data["num_samples"]),
            risk=asked.get("risk") if target == "max_risk" else None,
            guarantee=asked.get("guarantee"),
        )

    def in_words(
        self, *, way: str = "early exit", last: str = "the final exit", of: str = "accuracy"
    ) -> str:
        """Say the target, and on how many samples the policy was chosen for it."""
        promise = ""
        if self.guarantee is not None:
            often = "on average" if self.guarantee == "mean" else f"probability {self.guarantee}"
            promise = f", guaranteed ({often})"
        return f"{self._limit(way, last, of)}, on {self.num_samples:,} calibration samples{promise}"

    def _limit(self, way: str, last: str, of: str) -> str:
        if self.target == "max_drop":
            return f"a drop of at most {points(self.limit)} of {of} from {last}"
        if self.target == "max_risk" and self.risk in RISKS:
            return RISKS[self.risk].in_words(self.limit, way, last)
        if self.target == "budget_share":
            return f"at most {percent(self.limit)} of the plain network's MACs"
        if self.target == "budget_macs":
            return f"at most {self.limit:,.0f} MACs a sample on average"
        return f"at most {self.limit:g} ms a sample on average"


def cannot_tell(asked: Asked | None, num_samples: float) -> str | None:
    """Say why samples are too few to tell whether a target holds.

    They are where the standard error of a loss as large as the target, which is the root of the
    target over their number, is larger than the target itself: then a single answer is more than
    the target allows. For budgets, and for targets below one percent, one percent counts.

    Example:
        >>> few = Asked(target="max_drop", limit=0.01, num_samples=9)
        >>> cannot_tell(few, 9).partition(":")[0]
        '9 calibration samples cannot tell a drop of 1 point'
        >>> cannot_tell(few, 250)
    """
    if asked is None or asked.guarantee is not None:
        return None
    is_limit = asked.target in ("max_drop", "max_risk")
    needed = max(asked.limit, _FINEST) if is_limit else _FINEST
    if num_samples * needed >= 1 - 1e-9:
        return None
    shown = asked.limit or _FINEST
    what = {"max_drop": f"a drop of {points(shown)}", "max_risk": f"a risk of {percent(shown)}"}
    return (
        f"{num_samples:,.0f} calibration samples cannot tell "
        f"{what.get(asked.target, 'the accuracy within a budget')}: a single answer is "
        f"{points(1 / num_samples)}. Set at least {math.ceil(1 / needed - 1e-9):,} aside"
    )
