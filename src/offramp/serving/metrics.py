"""Counts of a server, as Prometheus reads them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Of what :meth:`Metrics.text` returns."""

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters of one server, in a registry of its own: a process may hold several servers.

    Labels are taken from what is served, never from what clients send, so that nobody can make
    them grow.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "offramp_requests",
            "Requests for an answer, by how they ended.",
            ["model", "outcome"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "offramp_request_seconds",
            "From a request's arrival, its body read, to its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._rows = Counter(
            "offramp_rows", "Samples answered.", ["model"], registry=self._registry
        )
        self._batch_rows = Histogram(
            "offramp_batch_rows",
            "Samples that were answered together.",
            ["model"],
            buckets=_ROWS,
            registry=self._registry,
        )
        self._queue_rows = Gauge(
            "offramp_queue_rows", "Samples that wait.", ["model"], registry=self._registry
        )
        self._exits = Counter(
            "offramp_exits",
            "Samples answered, by the exit they left by.",
            ["model", "exit"],
            registry=self._registry,
        )

    def count_request(self, model: str, outcome: str, seconds: float) -> None:
        """Count a request that has ended."""
        self._requests.labels(model, outcome).inc()
        self._seconds.labels(model).observe(seconds)

    def count_batch(
        self, model: str, rows: int, exit_index_B: npt.NDArray[np.int64] | None
    ) -> None:
        """Count a batch that was answered."""
        self._rows.labels(model).inc(rows)
        self._batch_rows.labels(model).observe(rows)
        if exit_index_B is None:
            return
        for index, count in zip(*np.unique(exit_index_B, return_counts=True), strict=True):
            self._exits.labels(model, str(index)).inc(float(count))

    def set_queue(self, model: str, rows: int) -> None:
        """Say how much waits."""
        self._queue_rows.labels(model).set(rows)

    def text(self) -> bytes:
        """Write everything down in Prometheus' text format."""
        return generate_latest(self._registry)
