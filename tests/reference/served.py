"""Servers for tests: of a tiny bundle in a process of its own, or of any model in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from offramp.exporting.bundle import export
from offramp.policy.confidence import entropy_confidence
from offramp.policy.policies import ThresholdPolicy
from offramp.runtime.files import TensorSpec
from offramp.serving.server import Server, ServerConfig
from offramp.zoo.mlp import mlp

X = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)
INPUT = "features_0"


def make_bundle(folder: Path) -> Path:
    """Two exits, 6 inputs, 4 classes; half of ``X`` leaves at each exit."""
    torch.manual_seed(0)
    network = mlp(in_features=6, widths=(5, 8), num_classes=4).eval()
    inputs = torch.from_numpy(X)
    with torch.no_grad():
        threshold = float(entropy_confidence(network(inputs)[0]).median())
    export(network, ThresholdPolicy((threshold,)), folder, inputs, plain=False)
    return folder


@contextlib.contextmanager
def serve_process(
    folder: Path, *arguments: object, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """``offramp serve`` with a name, in a process that cannot import torch."""
    argv = ["offramp", "serve", folder, "--name", "tiny", "--threads", "1"]
    argv += ["--http-port", "0", "--grpc-port", "0", *arguments]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"sys.argv = {[str(argument) for argument in argv]}\n"
        "from offramp.cli import main; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    ) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"serving tiny at https?://(\S+) and grpcs?://(\S+)\n", line)
            assert found, line + process.stderr.read()
            yield process, found[1], found[2]
        finally:
            process.kill()


@contextlib.contextmanager
def serve_in_thread(*models: object, **settings: object) -> Iterator[tuple[str, str]]:
    """Addresses of HTTP and gRPC of a server that runs in this process."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    try:
        server = Server(models, ServerConfig(http_port=0, grpc_port=0, **settings))
        run(server.start())
        try:
            yield f"127.0.0.1:{server.http_port}", f"127.0.0.1:{server.grpc_port}"
        finally:
            run(server.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Gated:
    """A model whose runs wait for ``gate``: doubles ``x``, and fails where one is negative."""

    name, version, metadata = "gated", "1", {}
    inputs = (TensorSpec(name="x", dtype="float32", sample_shape=(None,)),)
    outputs = (TensorSpec(name="y", dtype="float32", sample_shape=(None,)),)

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)
        self.batches: list[list[float]] = []

    def prepare(self, inputs, parameters):
        return [inputs["x"]]

    def run(self, arrays, *, deadline_ms=None):
        self.deadline_ms = deadline_ms
        self.started.release()
        assert self.gate.wait(30)
        (x,) = arrays
        self.batches.append(x[:, 0].tolist())
        if (x < 0).any():
            raise ValueError("a negative number")
        return {"y": 2 * x}
