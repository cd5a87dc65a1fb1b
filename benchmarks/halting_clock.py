"""Milliseconds of dropping tokens against the plain network, with depths that a seed has fixed.

Network: the size of DeiT-tiny for images of 224x224, untrained. The tokens of patches halt after
round(N(7.23, 2.5)) layers in 1 to 12, each drawn for itself; the class token runs every layer.
Scores are really computed, tokens really dropped (``halting_plan.py``). Before the clock starts,
every way of running is compared with the masked pass and with the plan. Every engine has a process
of its own; they take turns, contender by contender (``halting_clock_worker.py`` names them).
Medians over the rounds. A gain is over the plain network in the engine and the way that is fastest
for it.

    python benchmarks/halting_clock.py [--batch-size 1,16] [--rounds 15] [--threads N] [--seed 0]
        [--keep-memory] [--json FILE]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clock import KEEP_MEMORY
from halting_plan import THRESHOLD, planned_network, planned_tokens
from offramp.errors import OfframpError
from offramp.evaluation.stopwatch import Laps, ProcessStopwatch, time_in_turn
from offramp.evaluation.timing import engine_versions
from offramp.exporting.bundle import export
from offramp.families.agreement import Runner, answer_in_batches
from offramp.families.halting import HaltingRunner, masked_pass
from offramp.measure.agreement import compare, require_agreement
from offramp.model.multi_exit import as_features
from offramp.policy.routing_policy import HaltingPolicy
from offramp.routing.halting import HaltingNetwork
from offramp.runtime import Bundle, Session
from record import circumstances, write_json
from skip_clock_worker import step_by_step

WORKER = Path(__file__).with_name("halting_clock_worker.py")
CHECKED = 32
"""Images that are compared."""
PLAIN = ("plain", "plain_alone")
HALTING = ("halting", "steps", "alone")


class Bar(NamedTuple):
    """What the gain over the fastest plain network should reach, or its part of the ideal."""

    batch_size: int
    figure: str
    least: float


BARS = (Bar(16, "speedup", 1.62), Bar(1, "realised", 0.85))


def check(network: HaltingNetwork, bundle: Bundle, images: Tensor, depth_NP: Tensor) -> None:
    """Make sure that every way of running answers as the masked pass does, and drops as planned.

    Raises:
        OfframpError: If one does not.
    """
    few = images[:CHECKED]
    runner, session = HaltingRunner(network, HaltingPolicy(THRESHOLD)), Session(bundle)
    ways: tuple[tuple[Runner, int], ...] = (
        (runner, 16),
        (runner, 1),
        (session, 16),
        (session, 1),
        (Session(step_by_step(bundle)), 16),
    )
    for way, batch_size in ways:
        result = answer_in_batches(way, few, batch_size=batch_size)
        require_agreement(compare(result, masked_pass(network, THRESHOLD, as_features(few))))
        if not torch.equal(result.tokens, planned_tokens(depth_NP)[: len(few)]):
            raise OfframpError(f"Other tokens ran than planned, in {type(way).__name__}.")


def start_engines(
    bundle: Bundle, images: Tensor, scratch: Path, *, seed: int, keep_memory: bool
) -> dict[str, ProcessStopwatch]:
    samples = scratch / "inputs.npy"
    np.save(samples, images.numpy())
    specs: dict[str, dict[str, Any]] = {
        "onnxruntime": {"folder": str(bundle.folder), "inputs": str(samples)},
        "torch": {"seed": seed},
    }
    common = {"threads": torch.get_num_threads()}
    return {
        engine: ProcessStopwatch(
            [sys.executable, str(WORKER), json.dumps({**common, "backend": engine, **spec})],
            KEEP_MEMORY if keep_memory else {},
        )
        for engine, spec in specs.items()
    }


def describe(laps: Mapping[str, Laps], network: HaltingNetwork, depth_NP: Tensor) -> dict[str, Any]:
    """Medians and quartiles of every engine, and gains over the fastest plain network."""
    ms = {
        engine: {name: median(values) for name, values in each.batch_ms.items()}
        for engine, each in laps.items()
    }
    intervals = {
        engine: {name: quantiles(values, n=4)[::2] for name, values in each.batch_ms.items()}
        for engine, each in laps.items()
    }
    fastest = min(times[name] for times in ms.values() for name in PLAIN if name in times)
    costs = network.costs(torch.zeros(1, 3, 224, 224))
    ideal = costs.plain_macs / float(costs.macs(planned_tokens(depth_NP)).double().mean())
    gains = {
        f"{engine} {name}": {
            "speedup": fastest / times[name],
            "realised": fastest / times[name] / ideal,
            "over_its_own_plain": times["plain"] / times[name],
        }
        for engine, times in ms.items()
        for name in HALTING
        if name in times
    }
    return {
        "num_batches": {engine: each.num_batches for engine, each in laps.items()},
        "ms": ms,
        "interval_ms": intervals,
        "fastest_plain_ms": fastest,
        "ideal_speedup": ideal,
        "gains": gains,
    }


def print_results(batch_size: int, row: Mapping[str, Any]) -> None:
    table = Table(title=f"batch {batch_size}: ms a batch", box=box.SIMPLE_HEAD)
    for column in ("engine", "contender", "median", "quartiles", "gain", "part of ideal", "own"):
        left = column in ("engine", "contender")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for engine, times in row["ms"].items():
        for name, ms in times.items():
            low, high = row["interval_ms"][engine][name]
            gain = row["gains"].get(f"{engine} {name}", {})
            figures = [f"{gain[key]:.2f}" if gain else "" for key in ("speedup", "realised")]
            own = f"{gain['over_its_own_plain']:.2f}" if gain else ""
            table.add_row(engine, name, f"{ms:.2f}", f"{low:.4g}-{high:.4g}", *figures, own)
        table.add_section()
    Console().print(table)
    print(
        f"fastest plain {row['fastest_plain_ms']:.2f} ms; MACs promise {row['ideal_speedup']:.2f}; "
        "own: over the plain network in the same engine, batch by batch"
    )
    for bar in BARS:
        if bar.batch_size == batch_size:
            way = max(row["gains"], key=lambda name: float(row["gains"][name][bar.figure]))
            found = row["gains"][way][bar.figure]
            met = "met" if found >= bar.least else "MISSED"
            print(f"batch {batch_size}: {bar.figure} {found:.2f} by {way} (bar {bar.least}: {met})")


def main(
    batch_size: Annotated[str, typer.Option(metavar="B,...")] = "1,16",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of every contender.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="That compute.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, images and plan.")] = 0,
    keep_memory: Annotated[
        bool, typer.Option(help="Let glibc keep freed memory, in every engine alike.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    around = circumstances()
    around["versions"] |= engine_versions(["onnxruntime"])
    network, images, depth_NP = planned_network(seed=seed)
    rows = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch = Path(folder)
        bundle = export(network, HaltingPolicy(THRESHOLD), scratch / "bundle", images[:16])
        check(network, bundle, images, depth_NP)
        engines = start_engines(bundle, images, scratch, seed=seed, keep_memory=keep_memory)
        for engine in engines.values():
            stack.callback(engine.close)
        for size in map(int, batch_size.split(",")):
            rows[str(size)] = describe(time_in_turn(engines, size, rounds), network, depth_NP)
            print_results(size, rows[str(size)])
    if json_file is not None:
        figures = {"seed": seed, "rounds": rounds, "keep_memory": keep_memory}
        write_json({**around, **figures, "batches": rows}, json_file)
    print(f"{around['hardware']}, {around['threads']} threads, torch {torch.__version__}")


if __name__ == "__main__":
    typer.run(main)
