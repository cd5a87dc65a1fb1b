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
    before = probes()
    for _ in range(10):
        breaker.failed()
    (mine,) = probes() - before
    breaker.close()
    wait_until(lambda: not mine.is_alive())


def test_a_part_that_is_there_but_answers_nothing_costs_one_call_a_probe():
    breaker = CircuitBreaker(lambda: None, failures=3, probe_s=0.01)
    for _ in range(3):
        breaker.failed()
    wait_until(lambda: not breaker.is_open)
    breaker.failed()
    assert breaker.is_open
    wait_until(lambda: not breaker.is_open)
    breaker.succeeded()
    breaker.failed()
    assert not breaker.is_open
    breaker.close()


def probes():
    """Threads that look for the other part."""
    return {thread for thread in threading.enumerate() if thread.name == "offramp-probe"}


@pytest.mark.parametrize(("failures", "probe_s"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_senseless_numbers_are_refused(failures, probe_s):
    with pytest.raises(InvalidArgumentError, match="at least 1 failure"):
        CircuitBreaker(refuse, failures=failures, probe_s=probe_s)
