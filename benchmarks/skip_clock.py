"""Milliseconds of skipping blocks against the plain network, with actions that a seed has fixed.

Networks: the paper's ResNet-38 for 32x32 images, and the same with four times the channels, both
untrained. Exactly 70 % or 50 % of the gated blocks run, drawn sample by sample, while the gates are
really computed (``skip_plan.py``). Before the clock starts, every way of running is compared with
the gated sum, and with the plan. Every engine has a process of its own; they take turns, contender
by contender (``skip_clock_worker.py`` names them). Medians over the rounds. The plan adds a few
nodes to onnxruntime's graphs that no real network has; what they take is measured and taken off.

    python benchmarks/skip_clock.py [--width 1,4] [--gates recurrent] [--batch-size 1,256]
        [--rounds 15] [--threads N] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
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

from offramp.errors import OfframpError
from offramp.evaluation.stopwatch import ProcessStopwatch, time_in_turn
from offramp.evaluation.timing import engine_versions
from offramp.exporting.bundle import export
from offramp.families.agreement import Runner, answer_in_batches
from offramp.families.skip import SkipRunner, gated_sum
from offramp.measure.agreement import compare, require_agreement
from offramp.model.multi_exit import as_features
from offramp.policy.routing_policy import GatePolicy
from offramp.routing.skip import SkipNetwork
from offramp.runtime import Bundle, Session, with_routing_threshold
from record import circumstances, write_json
from skip_clock_worker import step_by_step
from skip_plan import SHARES, planned_blocks, planned_network, without_plan

WORKER = Path(__file__).with_name("skip_clock_worker.py")
CHECKED = 128
"""Samples that are compared one by one; all are in batches."""


class Bar(NamedTuple):
    """What the gain should reach, or what part of the gain that MACs promise."""

    width: int
    engine: str
    batch_size: int
    share: float
    figure: str
    least: float


BARS = (
    Bar(1, "onnxruntime", 1, 0.7, "speedup", 1.0),
    Bar(1, "onnxruntime", 1, 0.5, "speedup", 1.2),
    *(Bar(4, "onnxruntime", 1, share, "realised", 0.85) for share in SHARES),
    *(Bar(width, "torch", 256, share, "realised", 0.75) for width in (1, 4) for share in SHARES),
)


def named(share: float) -> str:
    return f"skip_{100 * share:.0f}"


def check(network: SkipNetwork, bundle: Bundle, images: Tensor, levels_NG: Tensor) -> None:
    """Make sure that every way of running answers as the gated sum does, and runs what is planned.

    Raises:
        OfframpError: If one does not.
    """
    few = images[:CHECKED]
    for threshold in SHARES.values():
        policy = GatePolicy(threshold)
        changed = with_routing_threshold(bundle, threshold)
        in_one, by_step = Session(changed), Session(step_by_step(changed))
        ways: tuple[tuple[Runner, Tensor, int], ...] = (
            (SkipRunner(network, policy), images, 256),
            (SkipRunner(network, policy), few, 1),
            (by_step, images, 256),
            (by_step, few, 1),
            (in_one, few, 1),
        )
        for runner, inputs, batch_size in ways:
            result = answer_in_batches(runner, inputs, batch_size=batch_size)
            require_agreement(compare(result, gated_sum(network, threshold, as_features(inputs))))
            if not torch.equal(result.blocks, planned_blocks(levels_NG, threshold)[: len(inputs)]):
                raise OfframpError(f"Other blocks ran than planned, at threshold {threshold}.")


def start_engines(
    network_options: Mapping[str, Any],
    bundle: Bundle,
    unplanned: Bundle,
    images: Tensor,
    scratch: Path,
) -> dict[str, ProcessStopwatch]:
    samples = scratch / "inputs.npy"
    np.save(samples, images.numpy())
    common = {
        "threads": torch.get_num_threads(),
        "thresholds": {named(share): at for share, at in SHARES.items()} | {"ask": 0.0},
    }
    specs = {
        "onnxruntime": {
            "folder": str(bundle.folder),
            "unplanned": str(unplanned.folder),
            "inputs": str(samples),
        },
        "torch": {"network": dict(network_options)},
    }
    return {
        engine: ProcessStopwatch(
            [sys.executable, str(WORKER), json.dumps({**common, "backend": engine, **spec})]
        )
        for engine, spec in specs.items()
    }


def measure(
    engines: Mapping[str, ProcessStopwatch],
    network: SkipNetwork,
    images: Tensor,
    levels_NG: Tensor,
    *,
    batch_size: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each engine: medians, quartiles, gains, and what part of the promise they are."""
    costs = network.costs(images)
    rows = []
    for engine, (batch_ms, num_batches) in time_in_turn(engines, batch_size, rounds).items():
        timed = levels_NG[: batch_size * num_batches]
        ms = {name: median(values) for name, values in batch_ms.items()}
        plan_ms = ms["ask"] - ms["ask_unplanned"] if "ask_unplanned" in ms else 0.0
        gains = {}
        for name in ms:
            if not name.startswith(("skip", "steps")):
                continue
            share = int(name.split("_")[1]) / 100
            blocks = planned_blocks(timed, SHARES[share])
            ideal = costs.plain_macs / float(costs.macs(blocks).double().mean())
            speedup = ms["plain"] / (ms[name] - plan_ms)
            gains[name] = {
                "share_run": float(blocks.double().mean()),
                "ideal_speedup": ideal,
                "speedup": speedup,
                "realised": speedup / ideal,
            }
        quartiles = {name: quantiles(values, n=4) for name, values in batch_ms.items()}
        rows.append(
            {
                "engine": engine,
                "batch_size": batch_size,
                "num_batches": num_batches,
                "ms": ms,
                "interval_ms": {name: (low, high) for name, (low, _, high) in quartiles.items()},
                # In the same graph or loop: what asking adds where nothing is skipped.
                "gates_ms": ms["ask"] - plan_ms - ms["plain"],
                "plan_ms": plan_ms,
                "gains": gains,
            }
        )
    return rows


def print_results(width: int, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=f"ResNet-38, width x{width}: ms a batch", box=box.SIMPLE_HEAD)
    for column in ("batch", "engine", "contender", "median", "quartiles", "gain", "ideal", "part"):
        left = column in ("engine", "contender")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        for name, (low, high) in row["interval_ms"].items():
            gain = row["gains"].get(name)
            figures = ("speedup", "ideal_speedup", "realised")
            table.add_row(
                str(row["batch_size"]),
                row["engine"],
                name,
                f"{row['ms'][name]:.3f}",
                f"{low:.3g}-{high:.3g}",
                *("" if gain is None else f"{gain[figure]:.2f}" for figure in figures),
            )
        table.add_section()
    Console(width=120).print(table)
    for row in rows:
        where = f"batch {row['batch_size']} {row['engine']}"
        print(
            f"{where}: gates take {row['gates_ms']:.3f} ms of {row['ms']['ask']:.3f}, "
            f"the plan {row['plan_ms']:.3f}, which gains leave out"
        )
        for bar in BARS:
            if (bar.width, bar.engine, bar.batch_size) != (width, row["engine"], row["batch_size"]):
                continue
            found = row["gains"][named(bar.share)][bar.figure]
            met = "met" if found >= bar.least else "MISSED"
            print(f"{where} {named(bar.share)}: {bar.figure} {found:.2f} (bar {bar.least}: {met})")


def main(
    width: Annotated[str, typer.Option(metavar="N,...", help="Times the channels.")] = "1,4",
    gates: Annotated[str, typer.Option(help="recurrent or feed_forward.")] = "recurrent",
    batch_size: Annotated[str, typer.Option(metavar="B,...")] = "1,256",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of every contender.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="That compute.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, samples and plan.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    content: dict[str, Any] = {}
    around = circumstances()
    around["versions"] |= engine_versions(["onnxruntime"])
    for factor in map(int, width.split(",")):
        options = {"width": factor, "gates": gates, "seed": seed}
        network, images, levels_NG = planned_network(**options)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            scratch = Path(folder)
            bundle = export(network, GatePolicy(SHARES[0.5]), scratch / "bundle", images[:64])
            check(network, bundle, images, levels_NG)
            unplanned = export(
                without_plan(network), GatePolicy(SHARES[0.5]), scratch / "unplanned", images[:64]
            )
            engines = start_engines(options, bundle, unplanned, images, scratch)
            for engine in engines.values():
                stack.callback(engine.close)
            rows = [
                row
                for size in map(int, batch_size.split(","))
                for row in measure(
                    engines, network, images, levels_NG, batch_size=size, rounds=rounds
                )
            ]
        print_results(factor, rows)
        content[f"width x{factor}"] = rows
        if json_file is not None:
            figures = {"gates": gates, "seed": seed, "rounds": rounds, "samples": len(images)}
            write_json({**around, **figures, "networks": content}, json_file)
    print(f"{around['hardware']}, {around['threads']} threads, torch {torch.__version__}")


if __name__ == "__main__":
    typer.run(main)
