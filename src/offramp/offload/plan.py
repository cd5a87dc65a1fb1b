"""Where to cut a network between an edge and a cloud: what a sample takes at each cut.

Shapes: ``K`` steps of a bundle, one per exit that is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offramp.errors import InvalidArgumentError

_P95 = 0.95


@dataclass(frozen=True, kw_only=True)
class CutCost:
    """What single samples take when the network is cut at one place.

    Attributes:
        split_after: The last stage on the edge; -1 for all in the cloud.
        codec: How features cross the link; None where nothing crosses.
        mean_ms: Milliseconds until the answer, the mean over samples.
        p95_ms: Milliseconds within which 95 % of the samples are answered.
        offloaded_share: Samples that cross the link.
        bytes_per_request: Bytes on the link both ways, the mean over all samples.
    """

    split_after: int
    codec: str | None
    mean_ms: float
    p95_ms: float
    offloaded_share: float
    bytes_per_request: float


@dataclass(frozen=True, kw_only=True)
class LinkTerms:
    """What is known of the link and of asking over it.

    Attributes:
        mbit: Megabits a second, each way.
        rtt_ms: Milliseconds there and back, for the first byte.
        call_ms: What a call takes that crosses nothing: writing, serving and reading it.
    """

    mbit: float
    rtt_ms: float
    call_ms: float = 0.0

    def __post_init__(self) -> None:
        if not (self.mbit > 0 and self.rtt_ms >= 0 and self.call_ms >= 0):
            raise InvalidArgumentError(
                "Expected more than 0 Mbit/s, and milliseconds of at least 0. "
                f"Got {self.mbit}, {self.rtt_ms} and {self.call_ms}."
            )

    def crossing_ms(self, num_bytes: float) -> float:
        """What it takes to ask and be answered.

        Args:
            num_bytes: Both ways together.
        Returns:
            Milliseconds.
        Example:
            >>> LinkTerms(mbit=8, rtt_ms=20, call_ms=1).crossing_ms(5000)
            26.0
        """
        return self.call_ms + self.rtt_ms + num_bytes * 8 / (1e3 * self.mbit)


def plan_split(
    *,
    exits: Sequence[int],
    edge_ms: Sequence[float],
    cloud_ms: Sequence[float],
    leaving: Sequence[float],
    call_bytes: Sequence[float],
    link: LinkTerms,
    codec: str,
) -> list[CutCost]:
    """Predict what every cut costs, all on the edge and all in the cloud included.

    Samples come one at a time, and nobody waits for another.

    Args:
        exits: The exit that each step ends with, K numbers.
        edge_ms: Milliseconds of each step on the edge, for a single sample.
        cloud_ms: The same in the cloud.
        leaving: Share of all samples that leave at each step, summing to 1.
        call_bytes: Bytes of a call and its answer at each cut, for a single sample: K numbers, the
            first with all in the cloud, the next with the first step on the edge, and so on.
        link: What the link is like.
        codec: How features cross it, for the record.
    Returns:
        K + 1 cuts, from all in the cloud to all on the edge.
    Raises:
        InvalidArgumentError: If the numbers are not of the same K steps, or no shares.
    Example:
        >>> cuts = plan_split(
        ...     exits=(0, 1), edge_ms=(10, 30), cloud_ms=(1, 3), leaving=(0.75, 0.25),
        ...     call_bytes=(5000, 1000), link=LinkTerms(mbit=8, rtt_ms=20), codec="float32",
        ... )
        >>> [(cut.split_after, cut.mean_ms) for cut in cuts]
        [(-1, 26.75), (0, 16.0), (1, 17.5)]
    """
    sizes = {len(part) for part in (exits, edge_ms, cloud_ms, leaving, call_bytes)}
    if len(sizes) != 1:
        raise InvalidArgumentError(f"Expected numbers of the same steps. Got {sorted(sizes)}.")
    share_K = np.array(leaving, dtype=np.float64)
    if (share_K < 0).any() or abs(share_K.sum() - 1) > 1e-6:
        raise InvalidArgumentError(
            f"The 'leaving' parameter must be shares that sum to 1. Got {list(leaving)}."
        )
    return [
        _cut(number, exits, np.array(edge_ms), np.array(cloud_ms), share_K, call_bytes, link, codec)
        for number in range(len(exits) + 1)
    ]


def best_cut(cuts: Sequence[CutCost]) -> CutCost:
    """The cut with the least mean latency; of equal ones the one with fewest bytes.

    Args:
        cuts: As :func:`plan_split` predicts them, or measured.
    Returns:
        One of them.
    """
    return min(cuts, key=lambda cut: (cut.mean_ms, cut.bytes_per_request))


def _cut(
    number: int,
    exits: Sequence[int],
    edge_ms_K: np.ndarray,
    cloud_ms_K: np.ndarray,
    share_K: np.ndarray,
    call_bytes: Sequence[float],
    link: LinkTerms,
    codec: str,
) -> CutCost:
    """What it costs to have the first ``number`` steps on the edge."""
    is_last = number == len(exits)
    num_bytes = 0.0 if is_last else call_bytes[number]
    until_K = edge_ms_K.cumsum()
    if not is_last:
        on_edge_ms = edge_ms_K[:number].sum()
        until_K[number:] = on_edge_ms + link.crossing_ms(num_bytes) + cloud_ms_K[number:].cumsum()
    offloaded = float(share_K[number:].sum())
    return CutCost(
        split_after=-1 if number == 0 else exits[number - 1],
        codec=None if is_last else codec,
        mean_ms=float(share_K @ until_K),
        p95_ms=_quantile(until_K, share_K, _P95),
        offloaded_share=offloaded,
        bytes_per_request=offloaded * num_bytes,
    )


def _quantile(value_K: np.ndarray, share_K: np.ndarray, level: float) -> float:
    """The least value that at least so large a share does not exceed."""
    order = value_K.argsort(kind="stable")
    reached = share_K[order].cumsum()
    return float(value_K[order][np.searchsorted(reached, level - 1e-9)])
