"""A circuit breaker: after some failures in a row nobody asks any more until a probe succeeds."""

from __future__ import annotations

import threading
from collections.abc import Callable

from offramp.errors import InvalidArgumentError


class CircuitBreaker:
    """Keeps callers from a part that is gone, and finds out by itself when it is back.

    Closed, calls go through. After ``failures`` in a row it opens: calls are not tried, and a
    thread probes every ``probe_s`` seconds. The first probe that succeeds closes it on trial: one
    more failure opens it again, so that a part that is there and answers nothing costs one call a
    probe. No caller ever waits for a probe.
    """

    def __init__(self, probe: Callable[[], None], *, failures: int, probe_s: float) -> None:
        if failures < 1 or not 0 < probe_s < 1e6:
            raise InvalidArgumentError(
                "Expected at least 1 failure that opens a breaker, and from above 0 to below 1e6 "
                f"seconds between probes. Got {failures} and {probe_s}."
            )
        self._probe = probe
        self._limit = failures
        self._probe_s = probe_s
        self._failed_in_a_row = 0
        self._lock = threading.Lock()
        self._is_open = False
        self._stopped = threading.Event()

    @property
    def is_open(self) -> bool:
        """True if calls are not to be tried."""
        return self._is_open

    def succeeded(self) -> None:
        """Say that a call went well."""
        with self._lock:
            self._failed_in_a_row = 0

    def failed(self) -> None:
        """Say that a call failed; the last of too many in a row starts the probing."""
        with self._lock:
            self._failed_in_a_row += 1
            if self._is_open or self._failed_in_a_row < self._limit:
                return
            self._is_open = True
        threading.Thread(target=self._probe_until_back, name="offramp-probe", daemon=True).start()

    def close(self) -> None:
        """Stop probing."""
        self._stopped.set()

    def _probe_until_back(self) -> None:
        while not self._stopped.wait(self._probe_s):
            try:
                self._probe()
            except Exception:  # whatever goes wrong, the other part is not there
                continue
            with self._lock:
                self._failed_in_a_row = self._limit - 1
                self._is_open = False
            return
