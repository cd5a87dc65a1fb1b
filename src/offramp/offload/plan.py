"""Planning the cut between an edge and a cloud: what a sample takes at each cut.

Shapes: ``K`` steps of a bundle, one per exit that is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offramp.errors import InvalidArgumentError

Array = npt.NDArray[np.float64]

_P95 = 0.95


@dataclass(frozen=True, kw_only=True)
class CutCost:
    """Times and bytes of single samples when the network is cut at one place.

    Attributes:
        split_after: The last stage on the edge; -1 for all in the cloud.
        codec: How features cross the link; None where nothing crosses.
        mean_ms: Milliseconds until the answer, the mean over samples.
        edge_ms: Of those, computing on the edge.
        link_ms: Of those, asking over the link and being answered.
        cloud_ms: Of those, computing in the cloud.
        p95_ms: Milliseconds within which 95 % of the samples are answered.
        offloaded_share: Samples that cross the link.
        bytes_per_request: Bytes on the link both ways, the mean over all samples.
    """

    split_after: int
    codec: str | None
    mean_ms: float
    edge_ms: float
    link_ms: float
    cloud_ms: float
    p95_ms: float
    offloaded_share: float
    bytes_per_request: float


@dataclass(frozen=True, kw_only=True)
class LinkTerms:
    """Speed and delay of the link.

    Attributes:
        mbit: Megabits a second, each way.
        rtt_ms: Milliseconds there and back, for the first byte.
    """

    mbit: float
    rtt_ms: float

    def __post_init__(self) -> None:
        if not (self.mbit > 0 and self.rtt_ms >= 0):
            raise InvalidArgumentError(
                "Expected more than 0 Mbit/s, and milliseconds of at least 0. "
                f"Got {self.mbit} and {self.rtt_ms}."
            )

    def crossing_ms(self, num_bytes: float) -> float:
        """Count the milliseconds that bytes take to cross it, there and back.

        Example:
            >>> LinkTerms(mbit=8, rtt_ms=20).crossing_ms(5000)
            25.0
        """
        return self.rtt_ms + num_bytes * 8 / (1e3 * self.mbit)


@dataclass(frozen=True, kw_only=True)
class CallCost:
    """A call over a link for a single sample, where the link itself takes no time.

    Attributes:
        call_bytes: Bytes both ways, headers included.
        call_ms: Milliseconds beside computing behind the cut: writing, serving and reading it.
    """

    call_bytes: float
    call_ms: float


def plan_split(
    *,
    exits: Sequence[int],
    edge_ms: Sequence[float],
    cloud_ms: Sequence[float],
    leaving: Sequence[float],
    calls: Sequence[CallCost],
    link: LinkTerms,
    codec: str,
) -> list[CutCost]:
    """Predict what every cut costs single samples, all on the edge and all in the cloud included.

    Args:
        exits: The exit that each step ends with, K numbers.
        edge_ms: Milliseconds of each step on the edge, for a single sample.
        cloud_ms: The same in the cloud.
        leaving: Share of all samples that leave at each step, summing to 1.
        calls: For a single sample at each cut but the last: the first with all in the cloud, the
            next with the first step on the edge, and so on; K of them.
        link: What the link is like.
        codec: How features cross it, for the record.
    Returns:
        K + 1 cuts, from all in the cloud to all on the edge.
    Raises:
        InvalidArgumentError: If the numbers are not of the same K steps, or no shares.
    Example:
        >>> cuts = plan_split(
        ...     exits=(0, 1), edge_ms=(10, 30), cloud_ms=(1, 3), leaving=(0.75, 0.25),
        ...     calls=(CallCost(call_bytes=5000, call_ms=0), CallCost(call_bytes=1000, call_ms=0)),
        ...     link=LinkTerms(mbit=8, rtt_ms=20), codec="float32",
        ... )
        >>> [(cut.split_after, cut.mean_ms) for cut in cuts]
        [(-1, 26.75), (0, 16.0), (1, 17.5)]
    """
    share_K = _checked_shares(leaving, (exits, edge_ms, cloud_ms, calls))
    cuts = []
    for number, cut in enumerate((-1, *exits)):
        # Nothing crosses behind the last step.
        call = calls[number] if number < len(calls) else CallCost(call_bytes=0.0, call_ms=0.0)
        is_behind_K = np.arange(len(exits)) >= number
        # How long samples that leave at each step are where.
        edge_ms_K = np.where(is_behind_K, 0.0, edge_ms).cumsum()
        cloud_ms_K = np.where(is_behind_K, cloud_ms, 0.0).cumsum()
        link_ms_K = is_behind_K * (call.call_ms + link.crossing_ms(call.call_bytes))
        offloaded = float(share_K @ is_behind_K)
        cuts.append(
            CutCost(
                split_after=cut,
                codec=None if number == len(exits) else codec,
                mean_ms=float(share_K @ (edge_ms_K + link_ms_K + cloud_ms_K)),
                edge_ms=float(share_K @ edge_ms_K),
                link_ms=float(share_K @ link_ms_K),
                cloud_ms=float(share_K @ cloud_ms_K),
                p95_ms=_quantile(edge_ms_K + link_ms_K + cloud_ms_K, share_K, _P95),
                offloaded_share=offloaded,
                bytes_per_request=offloaded * call.call_bytes,
            )
        )
    return cuts


def best_cut(cuts: Sequence[CutCost]) -> CutCost:
    """The cut with the least mean latency; of equal ones the one with fewest bytes."""
    return min(cuts, key=lambda cut: (cut.mean_ms, cut.bytes_per_request))


def _checked_shares(leaving: Sequence[float], others: Sequence[Sequence[object]]) -> Array:
    sizes = {len(part) for part in (leaving, *others)}
    if len(sizes) != 1:
        raise InvalidArgumentError(f"Expected numbers of the same steps. Got {sorted(sizes)}.")
    share_K = np.array(leaving, dtype=np.float64)
    if (share_K < 0).any() or abs(share_K.sum() - 1) > 1e-6:
        raise InvalidArgumentError(
            f"The 'leaving' parameter must be shares that sum to 1. Got {list(leaving)}."
        )
    return share_K


def _quantile(value_K: Array, share_K: Array, level: float) -> float:
    """The least value that at least so large a share does not exceed."""
    order = value_K.argsort(kind="stable")
    reached = share_K[order].cumsum()
    return float(value_K[order][np.searchsorted(reached, level - 1e-9)])
