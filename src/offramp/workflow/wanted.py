"""Wishes for a policy; light to import, so that options are refused at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

LEARNED = "learned"
"""The rule that is no confidence function: scorers are fitted on the calibration data."""

TARGETS = ("max_drop", "max_risk", "budget_macs", "budget_share")
"""Targets of ``calibrate`` of the library, without a clock."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Settings for timing the parts of a network.

    Attributes:
        batch_size: Samples a batch.
        backend: torch or onnxruntime.
    """

    batch_size: int
    backend: str


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Wishes for a policy; one target is given, the others are None.

    Attributes:
        max_drop: Most accuracy to lose.
        max_risk: Most of another risk.
        risk: Which.
        budget_macs: Mean MACs per sample.
        budget_share: The same as a share of the plain network's.
        budget_ms: Mean milliseconds per sample.
        guarantee: Probability, or "mean"; None without a promise.
        rule: Confidence function, or ``LEARNED``; None for the default, or without exits.
        pixel_threshold: How sure a pixel must be to count as sure; None to choose it too.
        patience: Exits in a row that must agree; None for thresholds alone.
        temperatures: all or survivors; None without temperatures.
        timing: For targets that need the clock.
    """

    max_drop: float | None = None
    max_risk: float | None = None
    risk: str = "accuracy_gap"
    budget_macs: float | None = None
    budget_share: float | None = None
    budget_ms: float | None = None
    guarantee: float | str | None = None
    rule: str | None = None
    pixel_threshold: float | None = None
    patience: int | None = None
    temperatures: str | None = None
    timing: Timing | None = None

    @property
    def is_fitted(self) -> bool:
        """True if the policy itself is fitted on samples, which training must not have seen."""
        return self.rule == LEARNED or self.temperatures is not None

    @property
    def risk_limit(self) -> dict[str, Any]:
        """The target of a guarantee as the library takes it."""
        limit = self.max_drop if self.max_risk is None else self.max_risk
        return {"max_risk": limit, "risk": self.risk, "guarantee": self.guarantee}

    @property
    def target(self) -> dict[str, Any]:
        """The target as ``calibrate`` of the library takes it."""
        values = {name: getattr(self, name) for name in TARGETS}
        target = {name: value for name, value in values.items() if value is not None}
        return target | ({"risk": self.risk} if "max_risk" in target else {})

    def to_dict(self) -> dict[str, Any]:
        """Name what was asked, without what was not."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.max_risk is None:
            del given["risk"]
        if self.timing is not None:
            given |= asdict(given.pop("timing"))
            given |= {"for": "latency"} if self.budget_ms is None else {}
        return given
