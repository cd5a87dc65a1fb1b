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
        max_drop: Spend least; lose at most this fraction of accuracy.
        max_risk: The same for the risk that is named.
        risk (NAME): disagreement (with the final exit), error, brier_gap or accuracy_gap, which is
            the default; of pixels pixel_error_gap.
        budget_macs: Be most accurate at this many mean MACs per sample.
        budget_share: The same as a share of the plain network's MACs, e.g. 0.5.
        budget_ms: Be most accurate at this mean time per sample; times the parts.
        rule (NAME): entropy (default), max_probability, margin, learned; by hand also
            entropy_nats. Of pixels: pixel_share (default), mean_max_probability, mean_entropy,
            low_quantile, agreement.
        pixel_threshold: For pixel_share: how sure a pixel must be; chosen too where left out.
        patience (N): Let a sample leave only if N exits in a row agree on it.
        temperatures (all|survivors): Fit one for each exit, on all samples or on those that reach
            it.
        guarantee: Keep max_drop or max_risk on new samples: with this probability, or on "mean".
        timing: For targets that need the clock.
    """

    max_drop: float | None = None
    max_risk: float | None = None
    risk: str | None = None
    budget_macs: float | None = None
    budget_share: float | None = None
    budget_ms: float | None = None
    rule: str | None = None
    pixel_threshold: float | None = None
    patience: int | None = None
    temperatures: str | None = None
    guarantee: float | str | None = None
    timing: Timing | None = None

    @property
    def risk_name(self) -> str:
        """The risk that is bounded, ``max_drop``'s included."""
        return self.risk or "accuracy_gap"

    @property
    def is_fitted(self) -> bool:
        """True if the policy itself is fitted on samples, which training must not have seen."""
        return self.rule == LEARNED or self.temperatures is not None

    @property
    def risk_limit(self) -> dict[str, Any]:
        """The target of a guarantee as the library takes it."""
        limit = self.max_drop if self.max_risk is None else self.max_risk
        return {"max_risk": limit, "risk": self.risk_name, "guarantee": self.guarantee}

    @property
    def target(self) -> dict[str, Any]:
        """The target as ``calibrate`` of the library takes it."""
        values = {name: getattr(self, name) for name in TARGETS}
        target = {name: value for name, value in values.items() if value is not None}
        return target | ({"risk": self.risk_name} if "max_risk" in target else {})

    def to_dict(self) -> dict[str, Any]:
        """Name what was asked, without what was not."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.max_risk is not None:
            given["risk"] = self.risk_name
        if self.timing is not None:
            given |= asdict(given.pop("timing"))
            given |= {"for": "latency"} if self.budget_ms is None else {}
        return given
