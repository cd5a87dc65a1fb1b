"""Milliseconds of three networks, in torch and in onnxruntime, against what else there is.

Contenders: the plain network; the tutorial's own test loop, in torch; Offramp leaving early, in
torch and from a bundle; Offramp asking at every exit and letting nobody go; earlyon 0.3.0 on the
same weights, where ``--earlyon`` names the Python of an environment that has it; and the limit,
which is the stages alone on those who reached them. Every engine has a process of its own; they
take turns, contender by contender. Medians over the rounds.

Networks: ``emnist-mlp`` (a trained run, at the tutorial's thresholds, also in int8),
``emnist-convnet`` (a trained run, at its own thresholds), and ``resnet18-32``, whose weights are
untrained and whose thresholds are quantiles, so that 30, 40 and 30 % leave whatever it says.

    OFFRAMP_DATA=... python benchmarks/clock.py [--network NAME ...] [--mlp RUN] [--convnet RUN]
        [--earlyon PYTHON] [--batch-size 1,32,256] [--rounds 9] [--threads N] [--json FILE]
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

from offramp.evaluation.stopwatch import ProcessStopwatch, time_in_turn
from offramp.exporting.bundle import export
from offramp.exporting.quantize import quantize
from offramp.families import check_agreement
from offramp.families.exits import AdaptiveRunner
from offramp.model.checkpoint import save_weights
from offramp.policy.confidence import max_probability_confidence
from offramp.policy.policies import Policy, ThresholdPolicy
from offramp.recipes.exits import find_recipe
from offramp.runs.run import (
    WEIGHTS_FILE,
    create_folder,
    load,
    load_batches,
    write_policy,
    write_recipe,
)
from offramp.runtime import Session
from record import circumstances, write_json

TUTORIAL_NATS = (0.1, 0.5)
FIXED_SHARES = (0.3, 0.4)
SAMPLES = 2048
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""Else glibc gives large buffers back after every batch, and the next pays for new pages."""
WORKER = Path(__file__).with_name("clock_worker.py")


class Bar(NamedTuple):
    """What a ratio of two times should reach, each named as "engine contender"."""

    network: str
    batch_sizes: tuple[int, ...]
    over: str
    under: str
    least: float


BARS = (
    Bar("emnist-mlp", (1, 256), "onnxruntime plain", "onnxruntime adaptive", 1.25),
    Bar("emnist-mlp", (1,), "torch tutorial", "onnxruntime adaptive", 1.6),
    Bar("emnist-mlp", (256,), "torch tutorial", "onnxruntime adaptive", 1.7),
    Bar("emnist-mlp", (1,), "torch tutorial", "int8 adaptive", 4.0),
    Bar("emnist-mlp", (256,), "earlyon earlyon", "torch adaptive", 1.3),
    Bar("resnet18-32", (32, 256), "earlyon earlyon", "torch adaptive", 1.4),
    Bar("resnet18-32", (1,), "onnxruntime plain", "onnxruntime never_exit", 1 / 1.08),
    Bar("resnet18-32", (256,), "onnxruntime plain", "onnxruntime never_exit", 1 / 1.05),
)
STAGE_BOUNDS = {
    ("resnet18-32", "onnxruntime"): (0.92, (1, 32, 256)),
    ("emnist-mlp", "onnxruntime"): (0.92, (256,)),
    ("emnist-convnet", "onnxruntime"): (0.92, (256,)),
    ("resnet18-32", "torch"): (0.88, (256,)),
    ("emnist-mlp", "torch"): (0.88, (256,)),
    ("emnist-convnet", "torch"): (0.88, (256,)),
}
REALISED = {"resnet18-32": 0.90, "emnist-mlp": 0.80, "emnist-convnet": 0.80}
"""In onnxruntime at batch 256."""


def prepare(
    name: str, scratch: Path, runs: Mapping[str, Path], data: str | None
) -> tuple[AdaptiveRunner, Tensor]:
    """Make a run folder ``scratch/run`` with the policy to be timed, and take real samples."""
    recipe = find_recipe(name)
    network = load(runs[name]).network if name in runs else recipe.build_network().eval()
    test, class_names, _ = load_batches(recipe, "test", data)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    inputs, _ = test.__getitems__(order[:SAMPLES].tolist())
    policy: Policy | None
    if name == "emnist-mlp":
        policy = ThresholdPolicy.from_entropy_nats(TUTORIAL_NATS, num_classes=len(class_names))
    elif name in runs:
        policy = load(runs[name]).policy
    else:
        policy = policy_of_fixed_shares(network, inputs)
    runner = AdaptiveRunner(network, policy)
    folder = create_folder(scratch / "run")
    write_recipe(folder, recipe=recipe, class_names=class_names, data=data)
    save_weights(network, folder / WEIGHTS_FILE)
    write_policy(folder, runner.policy)
    return runner, inputs


@torch.inference_mode()
def policy_of_fixed_shares(network: torch.nn.Module, inputs: Tensor) -> ThresholdPolicy:
    """Thresholds that let given shares of the samples leave, whatever the network has learnt."""
    outputs = [network(batch) for batch in inputs.split(256)]
    remaining = torch.ones(len(inputs), dtype=torch.bool)
    thresholds = []
    for k, share in enumerate(FIXED_SHARES):
        confidence = max_probability_confidence(torch.cat([output[k] for output in outputs]))
        leavers = round(share * len(inputs))
        threshold = confidence[remaining].sort(descending=True).values[leavers - 1]
        thresholds.append(float(threshold))
        remaining &= confidence < threshold
    return ThresholdPolicy(tuple(thresholds), rule="max_probability")


def start_engines(
    scratch: Path,
    runner: AdaptiveRunner,
    inputs: Tensor,
    *,
    earlyon: str | None,
    with_int8: bool,
    keep_memory: bool,
) -> dict[str, ProcessStopwatch]:
    """A process for every engine, after its answers have been checked."""
    samples = scratch / "inputs.npy"
    np.save(samples, inputs.numpy())
    parity = inputs[:512]
    bundle = export(runner.network, runner.policy, scratch / "bundle", parity)
    check_agreement(runner.run(inputs), runner, inputs)
    check_agreement(Session(bundle).run(inputs), runner, inputs)
    common = {"inputs": str(samples), "threads": torch.get_num_threads()}
    environment = KEEP_MEMORY if keep_memory else {}

    def of_bundle(folder: Path) -> ProcessStopwatch:
        spec = {**common, "backend": "onnxruntime", "folder": str(folder)}
        module = "offramp.evaluation.worker"
        return ProcessStopwatch([sys.executable, "-m", module, json.dumps(spec)], environment)

    def of_run(python: str, kind: str) -> ProcessStopwatch:
        spec = {**common, "kind": kind, "folder": str(scratch / "run")}
        return ProcessStopwatch([python, str(WORKER), json.dumps(spec)], environment)

    engines = {"torch": of_run(sys.executable, "torch"), "onnxruntime": of_bundle(bundle.folder)}
    if with_int8:
        quantize(bundle, scratch / "int8", parity.numpy())
        engines["int8"] = of_bundle(scratch / "int8")
    if earlyon is not None and not runner.policy.off_exits:  # earlyon knows no exit that is off
        engines["earlyon"] = of_run(earlyon, "earlyon")
    return engines


def measure(
    engines: Mapping[str, ProcessStopwatch],
    runner: AdaptiveRunner,
    inputs: Tensor,
    *,
    batch_size: int,
    rounds: int,
) -> dict[str, Any]:
    """Medians and quartiles of every contender at one batch size."""
    laps = time_in_turn(engines, batch_size, rounds)
    ms, interval_ms, realised, stage_bound = {}, {}, {}, {}
    plain_macs = runner.network.costs(inputs).plain_macs
    macs_N = torch.cat([runner.run(batch).macs for batch in inputs.split(256)]).double()
    ideal = {}
    for engine, (batch_ms, num_batches) in laps.items():
        for contender, values in batch_ms.items():
            low, _, high = quantiles(values, n=4)
            ms[f"{engine} {contender}"] = median(values)
            interval_ms[f"{engine} {contender}"] = (low, high)
        if "adaptive" in batch_ms:
            ideal[engine] = plain_macs / float(macs_N[: batch_size * num_batches].mean())
            adaptive_ms = ms[f"{engine} adaptive"]
            realised[engine] = ms[f"{engine} plain"] / adaptive_ms / ideal[engine]
            stage_bound[engine] = ms[f"{engine} stages"] / adaptive_ms
    return {
        "batch_size": batch_size,
        "ms": ms,
        "interval_ms": interval_ms,
        "ideal_speedup": ideal,
        "realised": realised,
        "stage_bound": stage_bound,
    }


def verdicts(network: str, row: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """What was to be reached at this batch size: name, figure, bar."""
    size, found = row["batch_size"], []
    for bar in BARS:
        known = bar.over in row["ms"] and bar.under in row["ms"]
        if bar.network == network and size in bar.batch_sizes and known:
            ratio = row["ms"][bar.over] / row["ms"][bar.under]
            found.append((f"{bar.over} / {bar.under}", ratio, bar.least))
    for (name, engine), (least, sizes) in STAGE_BOUNDS.items():
        if name == network and size in sizes:
            found.append((f"{engine} stage_bound", row["stage_bound"][engine], least))
    if size == 256:
        realised = row["realised"]["onnxruntime"]
        found.append(("onnxruntime realised", realised, REALISED[network]))
    return found


def print_results(network: str, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=f"{network}: milliseconds a batch", box=box.SIMPLE_HEAD)
    for column in ("batch", "engine", "contender", "median", "quartiles"):
        left = column in ("engine", "contender")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        for name, (low, high) in row["interval_ms"].items():
            engine, contender = name.split(" ")
            quartiles_ms = f"{low:.3g}-{high:.3g}"
            table.add_row(
                str(row["batch_size"]), engine, contender, f"{row['ms'][name]:.3f}", quartiles_ms
            )
        table.add_section()
    console = Console()
    console.print(table)
    for row in rows:
        for name, figure, least in verdicts(network, row):
            met = "met" if figure >= least else "MISSED"
            print(f"batch {row['batch_size']}: {name} {figure:.2f} (bar {least:.2f}: {met})")


def main(
    network: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    mlp: Annotated[Path, typer.Option(help="A trained emnist-mlp run.")] = Path("runs/emnist-mlp"),
    convnet: Annotated[Path, typer.Option(help="A trained and calibrated run.")] = Path(
        "benchmarks/runs/emnist-convnet"
    ),
    earlyon: Annotated[str | None, typer.Option(help="Python that can import earlyon.")] = None,
    batch_size: Annotated[str, typer.Option(metavar="B,...")] = "1,32,256",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of every contender.")] = 9,
    threads: Annotated[int | None, typer.Option(min=1, help="That compute.")] = None,
    keep_memory: Annotated[
        bool, typer.Option(help="Let glibc keep freed memory, in every engine alike.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    runs = {"emnist-mlp": mlp, "emnist-convnet": convnet}
    content: dict[str, Any] = {}
    for name in network or [*runs, "resnet18-32"]:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            scratch = Path(folder)
            runner, inputs = prepare(name, scratch, runs, None)
            engines = start_engines(
                scratch,
                runner,
                inputs,
                earlyon=earlyon,
                with_int8=name == "emnist-mlp",
                keep_memory=keep_memory,
            )
            for engine in engines.values():
                stack.callback(engine.close)
            rows = [
                measure(engines, runner, inputs, batch_size=int(size), rounds=rounds)
                for size in batch_size.split(",")
            ]
        print_results(name, rows)
        content[name] = rows
        around = circumstances()
        if json_file is not None:
            figures = {**around, "rounds": rounds, "samples": SAMPLES, "networks": content}
            write_json(figures, json_file)
    print(f"{around['hardware']}, {around['threads']} threads, torch {torch.__version__}")


if __name__ == "__main__":
    typer.run(main)
