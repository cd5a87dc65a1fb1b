"""Does the plan name the best cut? Every cut measured over a link, beside what the plan predicts.

RUN has a bundle. A cloud (`offramp cloud`) and a link (`offramp link`) run as processes of their
own; the edge runs here, slowed so that all its stages take --edge-ms, as a device's would: behind
every step it sleeps. Test samples go one at a time, the same for every cut, the cuts taking turns
of ten after one that does not count; answers are compared with the undivided network's. The plan is
made in the same run.

    OFFRAMP_DATA=... python benchmarks/split_clock.py RUN [--mbit 10] [--rtt-ms 20] [--edge-ms 100]
        [--codec int8+zstd] [--samples 200] [--json FILE]
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from offramp import EdgeConfig, EdgeRunner, HttpLink
from offramp.data.sources import SOURCES
from offramp.offload.calls import plan_bundle
from offramp.offload.edge import Traffic
from offramp.offload.plan import CutCost, LinkTerms, best_cut
from offramp.runs.run import CALIBRATION_SPLIT, load_batches
from offramp.runtime import Bundle, Session, read_bundle
from offramp.runtime.bundle import find_bundle
from offramp.runtime.part import PartSession, cuts
from offramp.runtime.step_profile import profile_steps
from offramp.workflow.recipe_samples import recipe_of
from record import circumstances, write_json

Array = npt.NDArray[Any]
PLANNED_WITH = 2000
"""Calibration samples whose exits the plan counts."""
TURN = 10
"""Samples that a cut answers one after the other, as in use, before it is the next one's turn."""


class SlowSteps:
    """Steps that take as long as a device's: each is followed by a sleep."""

    def __init__(self, bundle: Bundle, edge_ms: list[float]) -> None:
        session = PartSession(bundle, threads=1)
        self._run_step = session._steps.run_step
        self._edge_ms = edge_ms
        self.output_shape = session.output_shape
        self.bundle = bundle

    def until(self, stop: int) -> SlowPart:
        """The first steps, in place of an edge's own."""
        return SlowPart(self, stop)


class SlowPart:
    """The first steps, for single samples, in place of an edge's own."""

    def __init__(self, steps: SlowSteps, stop: int) -> None:
        self._steps, self._stop = steps, stop
        self.bundle, self.output_shape = steps.bundle, steps.output_shape

    def run(self, carried: list[Array]) -> Any:
        """As a part's session runs them."""
        from offramp.runtime.loop import PartResult

        for index in range(self._stop):
            end = time.perf_counter() + self._steps._edge_ms[index] / 1e3
            _, (output, confidence, leave, *carried) = self._steps._run_step(index, carried)
            time.sleep(max(0.0, end - time.perf_counter()))
            if leave[0]:
                break
        rows = np.flatnonzero(~leave)
        return PartResult(
            output=output,
            confidence=confidence,
            exit_index=np.array([self.bundle.steps[index].exit_index]),
            rows=rows,
            carried=carried,
        )


def start(stack: ExitStack, *arguments: object) -> int:
    """Start a command of ours; returns the port that it says."""
    command = [sys.executable, "-m", "offramp", *map(str, arguments)]
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    stack.callback(process.terminate)
    assert process.stdout is not None
    found = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
    assert found is not None
    return int(found[1])


def measure(
    bundle: Bundle, samples: Array, edge_ms: list[float], port: int, codec: str
) -> dict[int, dict[str, float]]:
    """Mean and p95 latency, and bytes, of every cut; the cuts take turns."""
    whole = Session(bundle, threads=1).run(samples)
    steps = SlowSteps(bundle, edge_ms)
    edges: dict[int, Any] = {}
    for number, cut in enumerate(cuts(bundle)[:-1]):
        link = HttpLink(f"http://127.0.0.1:{port}", bundle, name="model", split_after=cut)
        config = EdgeConfig(codec=codec, deadline_ms=20_000)
        edges[cut] = EdgeRunner(bundle, split_after=cut, link=link, config=config, threads=1)
        if number:
            edges[cut]._local = steps.until(number)
    last = bundle.steps[-1].exit_index
    all_here = steps.until(len(bundle.steps))
    taken: dict[int, list[float]] = {cut: [] for cut in (*edges, last)}
    same = dict.fromkeys(edges, 0)
    for first in range(0, len(samples), TURN):
        rows = range(first, min(first + TURN, len(samples)))
        for cut, edge in edges.items():
            edge.run(samples[first : first + 1])  # its cloud slept while others had their turns
            for row in rows:
                began = time.perf_counter()
                result = edge.run(samples[row : row + 1])
                taken[cut].append(1e3 * (time.perf_counter() - began))
                assert not result.fell_back.any(), edge.last_error
                same[cut] += int(result.output.argmax() == whole.output[row].argmax())
        for row in rows:
            began = time.perf_counter()
            all_here.run([samples[row : row + 1]])
            taken[last].append(1e3 * (time.perf_counter() - began))
    measured = {}
    for cut, times in taken.items():
        edge = edges.get(cut)
        traffic = Traffic(samples=1) if edge is None else edge.traffic
        measured[cut] = {
            "mean_ms": float(np.mean(times)),
            "p95_ms": float(np.quantile(times, 0.95)),
            "bytes": (traffic.sent_bytes + traffic.received_bytes) / traffic.samples,
            "same_class": 1.0 if edge is None else same[cut] / len(samples),
        }
        if edge is not None:
            edge.close()
    return measured


def print_table(plan: list[CutCost], measured: dict[int, dict[str, float]], title: str) -> None:
    best = min(measured, key=lambda cut: measured[cut]["mean_ms"])
    table = Table(title=title)
    for column in ("cut after", "planned ms", "measured ms", "off", "p95", "bytes", "same class"):
        table.add_column(column, justify="right")
    for cut in plan:
        row = measured[cut.split_after]
        marks = " planned" * (cut is best_cut(plan)) + " best" * (cut.split_after == best)
        table.add_row(
            f"{cut.split_after}{marks}",
            f"{cut.mean_ms:.2f}",
            f"{row['mean_ms']:.2f}",
            f"{100 * (cut.mean_ms / row['mean_ms'] - 1):+.1f} %",
            f"{cut.p95_ms:.1f} / {row['p95_ms']:.1f}",
            f"{cut.bytes_per_request:,.0f} / {row['bytes']:,.0f}",
            f"{100 * row['same_class']:.1f} %",
        )
    Console().print(table)
    planned = measured[best_cut(plan).split_after]["mean_ms"]
    print(
        f"the planned cut takes {planned:.2f} ms, the best {measured[best]['mean_ms']:.2f}; all in "
        f"the cloud {measured[-1]['mean_ms']:.2f}, all on the edge "
        f"{measured[plan[-1].split_after]['mean_ms']:.2f}"
    )


def main(
    run: Annotated[Path, typer.Argument(help="A run with a bundle, or a bundle.")],
    mbit: Annotated[float, typer.Option(help="Of the link.")] = 10.0,
    rtt_ms: Annotated[float, typer.Option(help="Of the link.")] = 20.0,
    edge_ms: Annotated[float, typer.Option(help="All stages on the device.")] = 100.0,
    codec: Annotated[str, typer.Option(help="How features cross.")] = "int8+zstd",
    samples: Annotated[int, typer.Option(help="Test samples, one at a time.")] = 200,
    data: Annotated[str | None, typer.Option(help="Folder with the Parquet files.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    folder = find_bundle(run)
    bundle = read_bundle(folder)
    recipe = recipe_of(bundle)
    here = profile_steps(bundle, threads=1)
    slow_ms = [ms * edge_ms / here.total_ms for ms in here.step_ms]

    def first(split: str, count: int) -> Array:
        batches = load_batches(recipe, split, data)[0].unaugmented()
        order = np.random.default_rng(0).permutation(len(batches))[:count]
        found: Array = batches.__getitems__(order.tolist())[0].numpy()
        return found

    link = LinkTerms(mbit=mbit, rtt_ms=rtt_ms)
    plan = plan_bundle(
        bundle,
        [first(CALIBRATION_SPLIT, PLANNED_WITH)],
        edge_ms=slow_ms,
        cloud_ms=profile_steps(bundle, threads=1).step_ms,
        link=link,
        codec=codec,
        threads=1,
    )
    with ExitStack() as stack:
        quiet = ("--name", "model", "--http-port", 0, "--grpc-port", -1, "--threads", 1)
        cloud = start(stack, "cloud", folder, *quiet)
        shape = ("--mbit", mbit, "--rtt-ms", rtt_ms)
        port = start(stack, "link", "--to", f"127.0.0.1:{cloud}", "--port", 0, *shape)
        judged = first(SOURCES[recipe.data].judging_split, samples)
        measured = measure(bundle, judged, slow_ms, port, codec)
    title = f"{recipe.name}, {mbit:g} Mbit/s, {rtt_ms:g} ms, device {edge_ms:g} ms, {codec}"
    print_table(plan, measured, title)
    if json_file is not None:
        asked = {"run": run.name, "codec": codec, "samples": samples, "edge_ms": edge_ms}
        figures = {"plan": [asdict(cut) for cut in plan], "measured": measured}
        write_json({**circumstances(), **asked, **asdict(link), **figures}, json_file)


if __name__ == "__main__":
    typer.run(main)
