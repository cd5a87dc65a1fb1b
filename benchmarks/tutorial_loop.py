"""Milliseconds of the tutorial's network at its thresholds: what does leaving early save?

Three contenders run the same weights on the same real test samples:

- plain: the backbone with its last classifier only, which is what a saving is measured against;
- tutorial: its own test loop, which runs every exit on every sample, takes softmax and entropy
  of all exits, and then chooses the first exit under its threshold;
- adaptive: ``AdaptiveRunner``, which goes on with the survivors only.

First the answers are compared, then the contenders are timed in turn, so that what else the
machine does falls on all of them; medians over the rounds, quartiles beside them. RUN is a
trained emnist-mlp run folder; its policy is not used. On the CPU.

    OFFRAMP_DATA=... python benchmarks/tutorial_loop.py RUN [--data DIR] [--threads N]
        [--batch-size 1,32,256,1024] [--rounds 31] [--json FILE]

Bars at batch 256 and 1024: 1.25 times as fast as plain, 1.3 times as fast as the tutorial's loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from offramp import AdaptiveRunner, MultiExitNetwork, ThresholdPolicy, load
from offramp.errors import OfframpError
from offramp.families import check_agreement
from offramp.measure.agreement import DECISION_TOLERANCE
from offramp.runs.run import load_batches
from record import circumstances, write_json

THRESHOLDS_NATS = (0.1, 0.5)
TUTORIAL_SHIFT_NATS = 5e-4
"""How far the tutorial's log(p + 1e-5) can move an entropy over 47 classes."""

BARS = {"plain": 1.25, "tutorial": 1.3}
BAR_BATCH_SIZES = (256, 1024)
SEED = 0
MAX_SAMPLES = 4096
MAX_BATCHES = 256
WARM_UP_ROUNDS = 3


def tutorial_entropies(network: MultiExitNetwork, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (K, B, C) of all exits and the entropies (K, B) of their softmax, as it has them."""
    logits_KBC = torch.stack(network(inputs))
    p_KBC = logits_KBC.softmax(-1)
    return logits_KBC, -(p_KBC * torch.log(p_KBC + 1e-5)).sum(-1)


def tutorial_loop(network: MultiExitNetwork, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Run everything, then choose: logits (B, C) and number (B,) of the first exit sure enough."""
    logits_KBC, entropy_KB = tutorial_entropies(network, inputs)
    exit_index_B = torch.full((len(inputs),), network.num_exits - 1)
    output_BC = logits_KBC[-1]
    for k in reversed(range(network.num_exits - 1)):
        is_sure_B = entropy_KB[k] < THRESHOLDS_NATS[k]
        exit_index_B = torch.where(is_sure_B, k, exit_index_B)
        output_BC = torch.where(is_sure_B[:, None], logits_KBC[k], output_BC)
    return output_BC, exit_index_B


def check_answers(runner: AdaptiveRunner, batches: Sequence[Tensor]) -> dict[str, int]:
    """Make sure that early exit and the tutorial's loop answer alike, and count the excused.

    Excused are samples whose entropy lies within the tutorial's shift, and the tolerance for
    rounding, of a threshold: they may leave elsewhere.
    """
    early = [runner.run(batch) for batch in batches]
    exit_index = torch.cat([result.exit_index for result in early])
    output = torch.cat([result.output for result in early])
    expected = [tutorial_loop(runner.network, batch) for batch in batches]
    expected_output, expected_exit = (torch.cat(parts) for parts in zip(*expected, strict=True))

    entropy_KN = torch.cat([tutorial_entropies(runner.network, batch)[1] for batch in batches], 1)
    distance_KN = (entropy_KN[:-1] - torch.tensor(THRESHOLDS_NATS)[:, None]).abs()
    tolerance_nats = TUTORIAL_SHIFT_NATS + DECISION_TOLERANCE * math.log(output.shape[1])
    excused_N = (distance_KN <= tolerance_nats).any(0)
    same_exit_N = exit_index == expected_exit
    if not (same_exit_N | excused_N).all():
        raise OfframpError(f"{int((~same_exit_N & ~excused_N).sum())} samples left elsewhere.")
    torch.testing.assert_close(
        output[same_exit_N], expected_output[same_exit_N], rtol=1e-3, atol=1e-4
    )
    same_label_N = output.argmax(-1) == expected_output.argmax(-1)
    if not same_label_N[same_exit_N].all():
        raise OfframpError("Samples that left by the same exit were given other labels.")
    return {
        "compared": len(exit_index),
        "near_a_threshold": int(excused_N.sum()),
        "left_elsewhere": int((~same_exit_N).sum()),
        "other_label": int((~same_label_N).sum()),
    }


def time_contenders(
    runner: AdaptiveRunner, batches: Sequence[Tensor], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds a batch of every contender in every round."""
    network, plain = runner.network, runner.network.plain()
    contenders: dict[str, Callable[[Tensor], object]] = {
        "plain": plain,
        "tutorial": lambda batch: tutorial_loop(network, batch),
        "adaptive": runner.run,
    }
    batch_ms: dict[str, list[float]] = {name: [] for name in contenders}
    for round_index in range(WARM_UP_ROUNDS + rounds):
        for name, answer in contenders.items():
            start = time.perf_counter()
            for batch in batches:
                answer(batch)
            elapsed_ms = 1e3 * (time.perf_counter() - start) / len(batches)
            if round_index >= WARM_UP_ROUNDS:
                batch_ms[name].append(elapsed_ms)
    return batch_ms


def measure(runner: AdaptiveRunner, batches: Sequence[Tensor], rounds: int) -> dict[str, Any]:
    """Compare the answers, then the times, at one batch size."""
    answers = check_answers(runner, batches)
    results = [runner.run(batch) for batch in batches]
    exit_index = torch.cat([result.exit_index for result in results])
    counts_K = exit_index.bincount(minlength=runner.network.num_exits)
    mean_macs = float(torch.cat([result.macs for result in results]).double().mean())
    batch_ms = time_contenders(runner, batches, rounds)
    middle_ms = {name: median(values) for name, values in batch_ms.items()}
    quartiles = {name: quantiles(values, n=4) for name, values in batch_ms.items()}
    return {
        "batch_size": len(batches[0]),
        "batches": len(batches),
        "answers": answers,
        "shares": [round(count / len(exit_index), 4) for count in counts_K.tolist()],
        "mean_macs": mean_macs,
        "ms": middle_ms,
        "interval_ms": {name: (low, high) for name, (low, _, high) in quartiles.items()},
        "speedup": {name: middle_ms[name] / middle_ms["adaptive"] for name in BARS},
        "ideal_speedup": runner.network.costs(batches[0]).plain_macs / mean_macs,
    }


def print_results(results: Sequence[dict[str, Any]]) -> None:
    title = "milliseconds a batch, and how many times as fast leaving early is"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("batch", "contender", "median", "quartiles", "speed-up", "bar", "ideal"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in results:
        for name, (low, high) in row["interval_ms"].items():
            speedup, bar = row["speedup"].get(name), ""
            if name in BARS and row["batch_size"] in BAR_BATCH_SIZES:
                bar = f"{BARS[name]} {'met' if speedup >= BARS[name] else 'MISSED'}"
            table.add_row(
                str(row["batch_size"]),
                name,
                f"{row['ms'][name]:.3f}",
                f"{low:.3g}-{high:.3g}",
                "" if speedup is None else f"{speedup:.2f}",
                bar,
                f"{row['ideal_speedup']:.2f}" if name == "plain" else "",
                end_section=name == "adaptive",
            )
    Console().print(table)


@torch.inference_mode()
def main(
    run: Annotated[Path, typer.Argument(help="A trained emnist-mlp run folder.")],
    data: Annotated[str | None, typer.Option(help="Folder with test.parquet.")] = None,
    batch_size: Annotated[str, typer.Option(metavar="B,...")] = "1,32,256,1024",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of every contender.")] = 31,
    threads: Annotated[int | None, typer.Option(min=1, help="That torch computes with.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load(run)
    test, class_names, _ = load_batches(loaded.require_recipe(), "test", data or loaded.data)
    policy = ThresholdPolicy.from_entropy_nats(THRESHOLDS_NATS, num_classes=len(class_names))
    runner = AdaptiveRunner(loaded.network, policy)

    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(SEED))
    inputs, _ = test.__getitems__(order.tolist())
    check_agreement(runner.run(inputs), runner, inputs)
    answers = check_answers(runner, inputs.split(256))
    print(
        f"all {len(inputs):,} test samples answered alike, but for {answers['left_elsewhere']} "
        f"that left elsewhere and {answers['other_label']} with another label, among "
        f"{answers['near_a_threshold']} within the tutorial's own error of a threshold"
    )
    results = []
    for size in (int(part) for part in batch_size.split(",")):
        full = [batch for batch in inputs[:MAX_SAMPLES].split(size) if len(batch) == size]
        results.append(measure(runner, full[:MAX_BATCHES], rounds))
    around = circumstances()
    print_results(results)
    print(f"{around['hardware']}, {around['threads']} threads, torch {torch.__version__}")
    if json_file is not None:
        content = {"seed": SEED, "thresholds_nats": THRESHOLDS_NATS, "rounds": rounds}
        write_json({**around, **content, "answers": answers, "results": results}, json_file)


if __name__ == "__main__":
    typer.run(main)
