import threading
import time

import pytest

from offramp.errors import InvalidArgumentError, OffloadError
from offramp.offload.breaker import CircuitBreaker


def wait_until(condition, *, timeout_s=5.0):
    end = time.perf_counter() + timeout_s
    while not condition():
        assert time.perf_counter() < end, "it took too long"
        time.sleep(0.002)


def refuse():
    raise OffloadError("gone")


def test_opens_after_failures_in_a_row_only():
    breaker = CircuitBreaker(refuse, failures=2, probe_s=60)
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert not breaker.is_open
    breaker.failed()
    assert breaker.is_open
    breaker.close()


def test_closes_by_itself_once_a_probe_succeeds():
    errors = iter([OffloadError("gone"), OSError("no route"), None])
    probed = []

    def probe():
        probed.append(next(errors))
        if probed[-1] is not None:
            raise probed[-1]

    breaker = CircuitBreaker(probe, failures=1, probe_s=0.01)
    breaker.failed()
    wait_until(lambda: not breaker.is_open)
    assert len(probed) == 3
    breaker.close()


def test_one_thread_probes_however_many_fail():
    breaker = CircuitBreaker(refuse, failures=1, probe_s=60)
    before = threading.active_count()
    for _ in range(10):
        breaker.failed()
    assert threading.active_count() == before + 1
    breaker.close()
    wait_until(lambda: threading.active_count() == before)


@pytest.mark.parametrize(("failures", "probe_s"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_senseless_numbers_are_refused(failures, probe_s):
    with pytest.raises(InvalidArgumentError, match="at least 1 failure"):
        CircuitBreaker(refuse, failures=failures, probe_s=probe_s)
