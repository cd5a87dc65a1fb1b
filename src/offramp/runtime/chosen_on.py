"""The choice of a policy: its target, the samples that chose it, and its figures on them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from offramp.decoding import Count, Share
from offramp.errors import ArtifactError

CALIBRATION_SPLIT = "calibration"
"""The samples that a recipe sets aside of train to choose a policy."""

_MOST_HASHES = 4096
"""Of more samples, those with the lowest hashes stand for all."""

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class ChosenOn:
    """The samples that chose a policy, as ``policy.json`` and ``bundle.json`` have them.

    Attributes:
        hashes: Hashes of 64 bits, sorted, in base64: of every sample, or the lowest of many.
    """

    name: str
    split: str
    num_samples: Count
    class_prior: str | Mapping[str, Share]
    sha256: str
    weighted: bool = False
    effective_num_samples: float | None = None
    hashes: Annotated[str, Meta(max_length=_MOST_HASHES * 11)] | None = None

    def count_among(self, hashes_N: Hashes) -> int:
        """Count the samples that are among those that chose; of many, about."""
        if self.hashes is None:
            return 0
        try:
            known = np.frombuffer(base64.b64decode(self.hashes, validate=True), dtype="<u8")
        except ValueError as error:
            raise ArtifactError(f"data.hashes: Expected 8 bytes a sample ({error})") from error
        if len(known) < _MOST_HASHES:
            return int(np.isin(hashes_N, known).sum())
        low_N = hashes_N[hashes_N <= known.max()]
        return round(float(np.isin(low_N, known).mean()) * len(hashes_N)) if len(low_N) else 0


def written_hashes(hashes_N: Hashes) -> str:
    """Write hashes as :class:`ChosenOn` keeps them."""
    lowest = np.unique(hashes_N)[:_MOST_HASHES]
    return base64.b64encode(lowest.astype("<u8").tobytes()).decode()


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """A policy on the front, and what it reached on the samples that chose.

    Attributes:
        thresholds: As in the policy; None where an exit is off.
        risk: The mean loss.
        mean_macs: Mean MACs per sample.
        accuracy: Of the answers.
        mean_iou: Where every pixel has a class.
    """

    thresholds: tuple[Share | None, ...]
    risk: float
    mean_macs: float
    accuracy: float
    mean_iou: float | None = None


@dataclass(frozen=True, kw_only=True)
class Front:
    """Policies in order, from where nobody leaves to the cheap end.

    Attributes:
        risk: Name of the risk that the points are judged by.
        passed: So many points from the first on passed the test of a promise; None without one.
        points: The policies.
    """

    risk: str
    passed: Count | None
    points: tuple[FrontPoint, ...]


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """The record beside a policy; ``data`` is None if thresholds were set by hand."""

    asked: Mapping[str, Any] | None = None
    data: ChosenOn | None = None
    reached: Mapping[str, float] | None = None
    guarantee: Mapping[str, Any] | None = None
    front: Front | None = None
