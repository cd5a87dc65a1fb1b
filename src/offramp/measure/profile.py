"""Times of a network's parts, and of a batch by these.

Shapes: ``K`` exits, ``S`` batch sizes that were timed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Times = tuple[tuple[float, ...], ...]
"""Milliseconds of each of K parts, at each of S batch sizes."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Milliseconds of a network's parts, each timed on batches of several sizes.

    Attributes:
        backend: The engine that ran.
        versions: Of the engine.
        hardware: Processor or GPU.
        threads: Threads that computed.
        sizes: Batch sizes that were timed, growing, 1 first.
        stage_ms: Of each stage, by size.
        exit_ms: Of each exit that is on, by size: its head, the decision, and what it costs to
            stop there to ask.
        compaction_ms: Of going on from each exit with half of the samples, by size; 0 after the
            final one.
    """

    backend: str
    versions: Mapping[str, str]
    hardware: str
    threads: int
    sizes: tuple[int, ...]
    stage_ms: Times
    exit_ms: Times
    compaction_ms: Times

    def batch_ms(self, reaching_K: Sequence[float], off: Collection[int] = ()) -> float:
        """Predict the milliseconds of a batch.

        Between the timed sizes, times are taken to grow evenly; a mean below one sample is taken as
        the share of the batches in which there is one, as it is for batches of one.

        Example:
            >>> profile = Profile(
            ...     backend="torch", versions={}, hardware="a processor", threads=1, sizes=(1, 10),
            ...     stage_ms=((1.0, 10.0), (2.0, 20.0)),
            ...     exit_ms=((0.5, 0.5), (0.5, 0.5)), compaction_ms=((0.1, 0.1), (0.0, 0.0)),
            ... )
            >>> profile.batch_ms((10, 5)), profile.batch_ms((10, 10), off={0})
            (21.1, 30.5)
        """
        return sum(
            self.running_ms(k, reaching) + (0.0 if k in off else self.asking_ms(k, reaching))
            for k, reaching in enumerate(reaching_K)
        )

    def running_ms(self, stage: int, reaching: float) -> float:
        """Predict the milliseconds of a stage, without what follows it."""
        return self._at(self.stage_ms[stage], reaching)

    def asking_ms(self, exit_index: int, reaching: float) -> float:
        """Predict the milliseconds that an exit costs that is on."""
        parts = (self.exit_ms[exit_index], self.compaction_ms[exit_index])
        return sum(self._at(part_S, reaching) for part_S in parts)

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON."""
        return asdict(self)

    def _at(self, part_S: Sequence[float], size: float) -> float:
        return float(np.interp(size, (0, *self.sizes), (0.0, *part_S)))
