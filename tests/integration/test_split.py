"""Edge and cloud as real processes over real sockets."""

import http.server
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tritonclient.http as triton_http
from split_network import IMAGES, write_bundle

from offramp.errors import ArtifactError, AuthenticationError, LinkTimeoutError, OffloadError
from offramp.offload.codec import CODECS
from offramp.offload.edge import EdgeConfig, EdgeRunner
from offramp.offload.http_link import HttpLink
from offramp.runtime import Session, read_bundle, with_thresholds
from offramp.runtime.bundle import write_bundle as write_json

RECOVERS_S = 10
"""Of a cloud that is back: 2 s on a machine that has nothing else to do."""


class Process:
    """A command of ours, running until the test is over."""

    def __init__(self, *arguments, env=None):
        self.arguments = [str(argument) for argument in arguments]
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "offramp", *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.env,
        )
        self.line = self.process.stdout.readline()
        assert self.line, self.process.stderr.read()
        found = re.search(r"(?:http://|from )127\.0\.0\.1:(\d+)", self.line)
        self.port = int(found.group(1))

    def start_again(self):
        """After a kill, on the same port."""
        self.arguments[self.arguments.index("--http-port") + 1] = str(self.port)
        self.start()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def folder(shared):
    return shared("split", lambda folder: write_bundle(folder / "small")) / "small"


@pytest.fixture(scope="module")
def bundle(folder):
    return read_bundle(folder)


@pytest.fixture(scope="module")
def whole(bundle):
    return Session(bundle, threads=1).run(IMAGES)


@pytest.fixture
def run():
    """Start a command; it is stopped when the test is over."""
    started = []

    def start(*arguments, **options):
        started.append(Process(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.stop()


@pytest.fixture(scope="module")
def cloud(folder):
    process = Process("cloud", folder, "--http-port", 0, "--grpc-port", -1, "--threads", 1)
    yield process
    process.stop()


def connect(bundle, split_after, port, *, token=None, **config):
    link = HttpLink(
        f"http://127.0.0.1:{port}", bundle, name="small", split_after=split_after, token=token
    )
    return EdgeRunner(
        bundle, split_after=split_after, link=link, config=EdgeConfig(**config), threads=1
    )


def assert_same(result, whole):
    np.testing.assert_allclose(result.output, whole.output, atol=1e-5)
    np.testing.assert_array_equal(result.exit_index, whole.exit_index)
    np.testing.assert_array_equal(result.macs, whole.macs)


@pytest.mark.parametrize("split_after", [-1, 0, 1, 2])
def test_every_cut_answers_as_the_whole_over_a_socket(bundle, whole, cloud, split_after):
    edge = connect(bundle, split_after, cloud.port, deadline_ms=20_000)
    result = edge.run(IMAGES)
    assert_same(result, whole)
    assert not result.fell_back.any()
    edge.close()


@pytest.mark.parametrize("codec", list(CODECS))
def test_every_codec_crosses(bundle, whole, cloud, codec):
    edge = connect(bundle, 0, cloud.port, codec=codec, deadline_ms=20_000)
    result = edge.run(IMAGES)
    assert not result.fell_back.any()
    assert (result.output.argmax(1) == whole.output.argmax(1)).mean() > 0.95
    edge.close()


def test_all_bytes_are_counted(bundle, whole, cloud, run):
    link = run("link", "--to", f"127.0.0.1:{cloud.port}", "--port", 0)
    edge = connect(bundle, 0, link.port, deadline_ms=20_000)
    edge.run(IMAGES)
    edge.close()
    counted = edge.traffic.sent_bytes + edge.traffic.received_bytes
    link.process.send_signal(signal.SIGTERM)
    out, _ = link.process.communicate(timeout=30)
    assert int(out.split()[0]) == counted


def test_three_processes_in_a_row_and_a_client(bundle, whole, folder, cloud, run):
    middle = run(
        *("edge", folder, "--starts-after", 0, "--split-after", 1, "--http-port", 0),
        *("--cloud", f"http://127.0.0.1:{cloud.port}", "--deadline-ms", 20_000),
    )
    edge = run(
        *("edge", folder, "--split-after", 0, "--http-port", 0, "--deadline-ms", 20_000),
        *("--cloud", f"http://127.0.0.1:{middle.port}"),
    )
    with triton_http.InferenceServerClient(f"127.0.0.1:{edge.port}") as client:
        sent = triton_http.InferInput(bundle.inputs[0].name, IMAGES.shape, "FP32")
        sent.set_data_from_numpy(IMAGES)
        answer = client.infer("small", [sent])
    np.testing.assert_allclose(answer.as_numpy("output"), whole.output, atol=1e-5)
    np.testing.assert_array_equal(answer.as_numpy("exit_index"), whole.exit_index)
    np.testing.assert_array_equal(answer.as_numpy("answered_by"), whole.exit_index.clip(0, 2))
    assert not answer.as_numpy("fell_back").any()


def test_a_cloud_with_other_thresholds_is_refused_at_connect(bundle, folder, cloud, tmp_path):
    other = with_thresholds(bundle, [0.9, 0.9, 0.9])
    edge = connect(other, 0, cloud.port)
    with pytest.raises(ArtifactError, match="same bundle"):
        edge._link.check(timeout_s=10)
    assert edge.run(IMAGES).fell_back.any()
    edge.close()
    copied = tmp_path / "small"
    shutil.copytree(folder, copied)
    write_json(with_thresholds(read_bundle(copied), [0.9, 0.9, 0.9]))
    refused = subprocess.run(
        [
            *(sys.executable, "-m", "offramp", "edge", str(copied), "--split-after", "0"),
            *("--cloud", f"http://127.0.0.1:{cloud.port}", "--http-port", "0"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2
    assert "same bundle" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_wrong_token_is_said_and_not_tried_again(bundle, folder, run):
    process = run(
        *("cloud", folder, "--http-port", 0, "--grpc-port", -1), env={"OFFRAMP_TOKEN": "right"}
    )
    edge = connect(bundle, 1, process.port, token="wrong", deadline_ms=20_000)
    assert edge.run(IMAGES).fell_back.any()
    assert isinstance(edge.last_error, AuthenticationError)
    assert edge.traffic.calls == 1
    edge.close()
    edge = connect(bundle, 1, process.port, token="right", deadline_ms=20_000)
    assert not edge.run(IMAGES).fell_back.any()
    edge.close()


def test_a_cloud_that_answers_garbage_is_not_believed(bundle, whole):
    class Garbage(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b"\x00garbage\xff")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Garbage)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    edge = connect(bundle, 1, server.server_address[1], deadline_ms=20_000, retries=0)
    np.testing.assert_array_equal(edge.run(IMAGES).fell_back, whole.exit_index > 1)
    edge.close()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_killed_cloud_costs_no_answer_and_is_used_again(bundle, whole, folder, run):
    process = run("cloud", folder, "--http-port", 0, "--grpc-port", -1, "--threads", 1)
    edge = connect(bundle, 0, process.port, deadline_ms=2000, probe_s=0.2)
    answers = []
    stopping = threading.Event()

    def ask():
        while not stopping.is_set():
            result = edge.run(IMAGES[:8])
            answers.append((time.perf_counter(), bool(result.fell_back.any())))
            assert len(result.output) == 8

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1)
        process.kill()
        time.sleep(1)
        process.start_again()
        back_at = time.perf_counter()
        while not any(at > back_at and not fell for at, fell in answers):
            assert time.perf_counter() < back_at + RECOVERS_S, "not used again in time"
            time.sleep(0.01)
        print(f"used again after {time.perf_counter() - back_at:.2f} s")
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
    assert any(fell for _, fell in answers)
    assert edge.traffic.samples == 8 * len(answers)
    assert_same(edge.run(IMAGES, deadline_ms=20_000), whole)
    edge.close()


def test_a_link_that_is_cut_and_comes_back(bundle, whole, cloud, run):
    link = run("link", "--to", f"127.0.0.1:{cloud.port}", "--port", 0)
    edge = connect(bundle, 0, link.port, deadline_ms=2000, probe_s=0.1, retries=0)
    assert not edge.run(IMAGES).fell_back.any()
    link.kill()
    assert edge.run(IMAGES).fell_back.any()
    link.arguments[link.arguments.index("--port") + 1] = str(link.port)
    link.start()
    end = time.perf_counter() + 10
    while edge.run(IMAGES).fell_back.any():
        assert time.perf_counter() < end
        time.sleep(0.02)
    edge.close()


def test_a_slow_link_is_left_at_the_deadline(bundle, whole, cloud, run):
    link = run("link", "--to", f"127.0.0.1:{cloud.port}", "--port", 0, "--rtt-ms", 3000)
    edge = connect(bundle, 0, link.port, deadline_ms=300)
    edge._link.check(timeout_s=20)
    started = time.perf_counter()
    result = edge.run(IMAGES)
    assert time.perf_counter() - started < 1.5
    np.testing.assert_array_equal(result.fell_back, whole.exit_index > 0)
    assert isinstance(edge.last_error, LinkTimeoutError)
    edge.close()


def test_stalled_packets_lose_no_answer(bundle, cloud, run):
    link = run(
        *("link", "--to", f"127.0.0.1:{cloud.port}", "--port", 0),
        *("--drop", 0.3, "--stall-ms", 50),
    )
    edge = connect(bundle, 0, link.port, deadline_ms=400, failures=1000)
    for _ in range(10):
        result = edge.run(IMAGES[:8])
        assert len(result.output) == 8
        assert np.isfinite(result.output).all()
    assert edge.traffic.samples == 80
    assert edge.traffic.offloaded > 0
    edge.close()


def test_nobody_there_is_said_once_and_local_answers_are_given(folder, run, bundle, whole):
    edge = run(
        *("edge", folder, "--split-after", 1, "--http-port", 0, "--cloud", "http://127.0.0.1:1"),
    )
    with triton_http.InferenceServerClient(f"127.0.0.1:{edge.port}") as client:
        sent = triton_http.InferInput(bundle.inputs[0].name, IMAGES.shape, "FP32")
        sent.set_data_from_numpy(IMAGES)
        answer = client.infer("small", [sent])
    np.testing.assert_array_equal(answer.as_numpy("fell_back"), whole.exit_index > 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("edge", "--split-after", "9", "--cloud", "http://127.0.0.1:1"), "one of -1, 0, 1, 2, 3"),
        (("edge", "--split-after", "1", "--cloud", "127.0.0.1:1"), "http://cloud:8000"),
        (("edge", "--split-after", "1", "--cloud", "http://x:1", "--codec", "jpeg"), "codec"),
        (("cloud", "--split-after", "3"), "--split-after must be one of -1, 0, 1, 2"),
    ],
)
def test_wrong_input_is_one_line(folder, arguments, said):
    command, *options = arguments
    failed = subprocess.run(
        [sys.executable, "-m", "offramp", command, str(folder), *options],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert failed.returncode == 2
    assert said in failed.stderr
    assert len(failed.stderr.splitlines()) == 1


def test_the_edge_imports_no_torch():
    code = (
        "import sys, offramp.offload.edge, offramp.offload.http_link, offramp.offload.cloud\n"
        "import offramp.serving.server\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_connecting_to_nobody_is_an_offload_error(bundle):
    edge = connect(bundle, -1, 1, retries=0)
    with pytest.raises(OffloadError, match="Cannot reach"):
        edge.run(IMAGES[:1])
    edge.close()
