"""One network over two machines, tried on one: cloud, link and edge as three processes.

    python examples/split.py RUN [--split-after K] [--mbit 10] [--rtt-ms 20] [--codec int8+zstd]

RUN is a run folder with a bundle in it (offramp export RUN). The test images of its data are sent
to the edge one by one over the Open Inference Protocol, with the client that users have, and the
table says who answered.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Annotated

import tritonclient.http as triton_http
import typer
from rich.console import Console
from rich.table import Table

from offramp import load, load_data
from offramp.runtime import read_bundle

NAME = "model"


def start(stack: ExitStack, *arguments: object) -> tuple[subprocess.Popen[str], int]:
    """Start a command of ours; returns it and the port that it says it listens on."""
    command = [sys.executable, "-m", "offramp", *map(str, arguments)]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    stack.callback(process.terminate)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r":(\d+)", line)
    if found is None:
        raise SystemExit(f"{' '.join(command)} did not start")
    print(f"{arguments[0]}: {line.strip()}")
    return process, int(found[1])


def main(
    run: Path,
    split_after: Annotated[int, typer.Option(help="Last stage on the edge.")] = 0,
    mbit: Annotated[float, typer.Option(help="Of the link.")] = 10.0,
    rtt_ms: Annotated[float, typer.Option(help="Of the link.")] = 20.0,
    codec: Annotated[str, typer.Option(help="How features cross it.")] = "int8+zstd",
    samples: Annotated[int, typer.Option(help="Images to send.")] = 200,
) -> None:
    """Start the three, send images, and say what came of it."""
    folder = run / "bundle"
    bundle = read_bundle(folder)
    batches = load_data(load(run))
    pairs = (pair for inputs, labels in batches for pair in zip(inputs, labels, strict=True))
    images, labels = zip(*islice(pairs, samples), strict=True)
    quiet = ("--name", NAME, "--http-port", 0, "--grpc-port", -1)
    with ExitStack() as stack:
        _, cloud_port = start(stack, "cloud", folder, *quiet)
        link_options = ("--port", 0, "--mbit", mbit, "--rtt-ms", rtt_ms)
        link, link_port = start(stack, "link", "--to", f"127.0.0.1:{cloud_port}", *link_options)
        edge_options = ("--split-after", split_after, "--codec", codec)
        cloud = ("--cloud", f"http://127.0.0.1:{link_port}")
        _, edge_port = start(stack, "edge", folder, *edge_options, *cloud, *quiet)
        client = stack.enter_context(triton_http.InferenceServerClient(f"127.0.0.1:{edge_port}"))
        answers = []
        for image in images:
            tensor = triton_http.InferInput(bundle.inputs[0].name, (1, *image.shape), "FP32")
            tensor.set_data_from_numpy(image[None].numpy())
            began = time.perf_counter()
            answer = client.infer(NAME, [tensor])
            latency_ms = 1e3 * (time.perf_counter() - began)
            names = ("label", "exit_index", "answered_by", "fell_back")
            answers.append((*(int(answer.as_numpy(name)[0]) for name in names), latency_ms))
        link.terminate()
        said, _ = link.communicate()
    print_table(answers, [int(label) for label in labels], bytes_on_link=int(said.split()[0]))


def print_table(
    answers: list[tuple[int, int, int, int, float]],
    labels: Sequence[int],
    *,
    bytes_on_link: int,
) -> None:
    """Who answered what, how well, and in what time."""
    table = Table(title=f"{len(answers)} images, one at a time")
    for column in ("exit", "answered by", "images", "right", "median ms", "fell back"):
        table.add_column(column, justify="right")
    for exit_index in sorted({answer[1] for answer in answers}):
        mine = [(a, y) for a, y in zip(answers, labels, strict=True) if a[1] == exit_index]
        table.add_row(
            str(exit_index),
            "cloud" if mine[0][0][2] else "edge",
            str(len(mine)),
            f"{100 * statistics.fmean(a[0] == y for a, y in mine):.1f} %",
            f"{statistics.median(a[4] for a, _ in mine):.1f}",
            str(sum(a[3] for a, _ in mine)),
        )
    Console().print(table)
    mean_ms = statistics.fmean(answer[4] for answer in answers)
    print(f"mean {mean_ms:.1f} ms an image, {bytes_on_link / len(answers):,.0f} bytes on the link")


if __name__ == "__main__":
    typer.run(main)
