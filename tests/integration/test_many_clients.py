"""200 clients at once, against real processes: nobody is lost, and who must wait is told so."""

import asyncio
import re
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from split_network import IMAGES, write_bundle

from offramp.runtime import Session, read_bundle
from offramp.serving.http_client import read_answer, write_request


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("clients") / "small"
    write_bundle(made)
    return made


@pytest.fixture
def start(request):
    """Start a command of ours; returns its process and address."""
    processes = []

    def start(*arguments):
        command = [sys.executable, "-m", "offramp", *map(str, arguments), "--threads", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process, re.search(r"http://[\d.]+:\d+", process.stdout.readline())[0]

    yield start
    for process in processes:
        process.terminate()
        process.communicate(timeout=60)


async def ask_for(url, folder, seconds, *, clients=200):
    """Clients ask one image after the other; statuses, latencies, and wrong answers."""
    bundle = read_bundle(folder)
    expected = Session(bundle, threads=1).run(IMAGES)
    statuses, latencies_s, wrong, fell = [], [], [], []
    end = time.perf_counter() + seconds

    async def ask(session, number):
        row = number % len(IMAGES)
        body, header_length = write_request({bundle.inputs[0].name: IMAGES[row : row + 1]}, {})
        headers = {"Inference-Header-Content-Length": str(header_length)}
        while time.perf_counter() < end:
            started = time.perf_counter()
            async with session.post(
                f"{url}/v2/models/small/infer", data=body, headers=headers
            ) as response:
                content = await response.read()
                statuses.append(response.status)
                length = response.headers.get("Inference-Header-Content-Length")
            latencies_s.append(time.perf_counter() - started)
            if statuses[-1] == 200:
                answer = read_answer(content, length, max_bytes=1 << 20)
                fell.append("fell_back" in answer and bool(answer["fell_back"][0]))
                if answer["exit_index"][0] != expected.exit_index[row] and not fell[-1]:
                    wrong.append(row)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(ask(session, number) for number in range(clients)))
    return statuses, latencies_s, wrong, fell


def report(name, statuses, latencies_s):
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    p50, p99 = (1e3 * np.quantile(latencies_s, level) for level in (0.5, 0.99))
    print(f"{name}: {counts}, median {p50:.0f} ms, p99 {p99:.0f} ms")


@pytest.mark.slow
def test_200_clients_for_a_minute_at_an_edge_and_its_cloud(folder, start):
    room = ("--max-queue-rows", 4096)
    _, cloud = start("cloud", folder, "--http-port", 0, "--grpc-port", -1, *room)
    process, edge = start(
        *("edge", folder, "--cloud", cloud, "--split-after", 0, "--http-port", 0),
        *("--deadline-ms", 20_000, *room),
    )
    statuses, latencies_s, wrong, fell = asyncio.run(ask_for(edge, folder, 60))
    print(f"{sum(fell)} of {len(fell)} fell back")
    report("edge and cloud", statuses, latencies_s)
    memory = Path(f"/proc/{process.pid}/status").read_text()
    print(re.search(r"VmRSS:.*", memory)[0])
    assert set(statuses) == {200}
    assert wrong == []
    assert sum(fell) < len(fell) / 100


@pytest.mark.slow
def test_200_clients_at_a_server_with_room_for_few(folder, start):
    options = ("--http-port", 0, "--grpc-port", -1, "--max-queue-rows", 8, "--max-batch-rows", 8)
    _, server = start("serve", folder, *options)
    statuses, latencies_s, wrong, _ = asyncio.run(ask_for(server, folder, 20))
    report("little room", statuses, latencies_s)
    assert set(statuses) == {200, 503}
    assert wrong == []
    recovered, *_ = asyncio.run(ask_for(server, folder, 1, clients=1))
    assert set(recovered) == {200}
