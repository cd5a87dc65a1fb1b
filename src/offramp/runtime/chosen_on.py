"""The choice of a policy: its target, the samples that chose it, and its figures on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offramp.decoding import Count, Share

CALIBRATION_SPLIT = "calibration"
"""The samples that a recipe sets aside of train to choose a policy."""


@dataclass(frozen=True, kw_only=True)
class ChosenOn:
    """The samples that chose a policy, as ``policy.json`` and ``bundle.json`` have them."""

    name: str
    split: str
    num_samples: Count
    class_prior: str | Mapping[str, Share]
    sha256: str
    weighted: bool = False
    effective_num_samples: float | None = None


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """The record beside a policy; ``data`` is None if thresholds were set by hand."""

    asked: Mapping[str, Any] | None = None
    data: ChosenOn | None = None
    reached: Mapping[str, float] | None = None
    guarantee: Mapping[str, Any] | None = None
