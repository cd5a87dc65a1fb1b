import platform
import subprocess
import sys

import pytest

_STEPS = """
import resource
import sys
import torch
from offramp.training.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
torch.set_num_threads(1)


def run(steps):
    for _ in range(steps):
        torch.zeros(2**24)


run(20)  # until the heap is as large as it gets
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
run(20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_memory_serves_the_next_step():
    given_back, kept = (_new_pages(way) for way in ("given back", "kept"))

    assert given_back > 1000
    assert kept < given_back / 20


def _new_pages(way: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _STEPS, way], capture_output=True, text=True, check=True
    )
    return int(done.stdout)
