"""Ways of training the exits: what does each do to every exit, from one start and one budget?

START_RUN is a trained run of a recipe with several exits (cifar10-resnet), variant plain or
adaptive. Its stages and final exit are taken; the exits before the final one start anew from the
seed. Every regime then trains as many epochs on the same samples in the same order, by the
recipe's optimiser at a small learning rate that decays to zero, with the recipe's loss weights:

- joint: every exit's loss trains all below it; from a plain start, the literature's "mixed";
- mixed: the final exit alone for the first half of the epochs, then jointly;
- frozen: only the exits before the final one;
- detached: those too, and the final exit alone trains the stages on;
- ramp: joint, the early exits' weights growing from 0 over the first half of the epochs;
- equilibrium: joint, but a stage learns from the mean of the losses behind it, not from the sum;
- distilled: joint, half of the early exits' loss coming from the final exit;
- mixed distilled: both.

Thresholds for a budget of mean MACs are chosen on calibration data; accuracies are on test data,
means over the seeds; spread is the adaptive one's highest less its lowest, in points; MACs are
the mean as a share of the plain network's. FILE is written after each run of a regime, and what it
holds from the same settings is not trained again.

    OFFRAMP_DATA=... python benchmarks/regimes.py START_RUN [--only joint,mixed] [--epochs 2]
        [--seeds 0,1] [--train-samples 20000] [--learning-rate 0.01] [--budget-share 0.55]
        [--json FILE]
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from offramp import MultiExitNetwork, calibrate, collect, fit, load
from offramp.data.images import Batches, make_loader
from offramp.recipes.recipe import Recipe
from offramp.runs.run import WEIGHTS_FILE, load_batches, load_training_data
from offramp.training.config import FitConfig
from record import circumstances, read_rows, write_json

SUBSET_SEED = 0
DISTILLATION = 0.5


def regimes(epochs: int) -> dict[str, dict[str, Any]]:
    """What each regime changes in the settings of joint training."""
    half = epochs // 2
    return {
        "joint": {},
        "mixed": {"backbone_epochs": half},
        "frozen": {"freeze_backbone": True},
        "detached": {"detach": True},
        "ramp": {"ramp_epochs": half},
        "equilibrium": {"gradient_equilibrium": True},
        "distilled": {"distillation": DISTILLATION},
        "mixed distilled": {"backbone_epochs": half, "distillation": DISTILLATION},
    }


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is the same for every regime.

    Attributes:
        recipe: Of the start, with all exits.
        start: The network that stages and final exit are taken from.
        train: What is trained on.
        calibration: Batches that thresholds are chosen on.
        test: Batches that judge.
        budget_share: Mean MACs a sample, as a share of the plain network's.
    """

    recipe: Recipe
    start: MultiExitNetwork
    train: Batches
    calibration: DataLoader[Any]
    test: DataLoader[Any]
    budget_share: float


def read_task(run: Path, *, data: str | None, num_train: int, budget_share: float) -> Task:
    """Load the start, and its data cut as they were when it was trained."""
    loaded = load(run)
    recipe = loaded.require_recipe()
    data = data or loaded.data
    train, calibration, _ = load_training_data(recipe, data)
    if calibration is None:
        raise typer.BadParameter(f"expected a run with calibration data; {run} sets none aside")
    test, _, _ = load_batches(recipe, "test", data)
    generator = torch.Generator().manual_seed(SUBSET_SEED)
    return Task(
        recipe=replace(recipe, variant="adaptive"),
        start=loaded.network,
        train=train.subset(torch.randperm(len(train), generator=generator)[:num_train]),
        calibration=make_loader(calibration, batch_size=256),
        test=make_loader(test, batch_size=256),
        budget_share=budget_share,
    )


def from_start(task: Task, seed: int) -> MultiExitNetwork:
    """The start's stages and final exit below exits that are new."""
    recipe = replace(task.recipe, fit=replace(task.recipe.fit, seed=seed))
    network = recipe.build_network()
    # In the order in which they run, wherever the cuts are.
    own, given = (of.plain().state_dict().values() for of in (network, task.start))
    if [tensor.shape for tensor in own] != [tensor.shape for tensor in given]:
        raise typer.BadParameter("expected a start of the recipe's own backbone, not a static one")
    for tensor, trained in zip(own, given, strict=True):
        tensor.copy_(trained)
    return network


def check_start(task: Task) -> None:
    """Make sure that the final exit of what is trained answers as the start's does."""
    inputs, _ = next(iter(task.test))
    with torch.inference_mode():
        ours, theirs = from_start(task, seed=0).eval()(inputs)[-1], task.start(inputs)[-1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def settings_of_joint(recipe: Recipe, *, epochs: int, learning_rate: float) -> FitConfig:
    """The recipe's settings without those of a regime, for a short training."""
    plain = replace(recipe, variant="plain").config_as_trained()
    return replace(
        plain,
        loss_weights=recipe.fit.loss_weights,
        epochs=epochs,
        learning_rate=learning_rate,
        device="cpu",
    )


def measure(task: Task, config: FitConfig) -> dict[str, Any]:
    """Train from the start and judge on test data."""
    network = from_start(task, config.seed)
    fit(network, task.train, config=config)
    chosen = calibrate(collect(network, task.calibration), budget_share=task.budget_share)
    test = collect(network, task.test)
    reached = test.measure(chosen.policy)
    return {
        "exit_accuracy": test.correct_KN.double().mean(1).tolist(),
        "adaptive_accuracy": reached.accuracy,
        "mean_macs_share": reached.mean_macs / test.costs.plain_macs,
    }


def describe(task: Task, run: Path, joint: FitConfig) -> dict[str, Any]:
    """The settings that rows must share to stand in one table; as JSON gives them back."""
    about = {
        "start": run.name,
        "start_sha256": hashlib.sha256((run / WEIGHTS_FILE).read_bytes()).hexdigest(),
        "recipe": task.recipe.name,
        "num_train": len(task.train),
        "budget_share": task.budget_share,
        "joint": {key: value for key, value in asdict(joint).items() if key != "seed"},
    }
    described: dict[str, Any] = json.loads(json.dumps(about))
    return described


def rows_before(path: Path | None, settings: dict[str, Any], epochs: int) -> list[dict[str, Any]]:
    """Rows of these regimes, as they are now, that were measured before."""
    known = regimes(epochs)
    rows = read_rows(path, settings)
    return [row for row in rows if known.get(row["regime"]) == row["changes"]]


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every regime's row of the table."""
    names = dict.fromkeys(row["regime"] for row in rows)
    return [mean_over_seeds([row for row in rows if row["regime"] == name]) for name in names]


def mean_over_seeds(own: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of a regime, and how far the adaptive accuracy spreads."""
    adaptive = [row["adaptive_accuracy"] for row in own]
    return {
        "regime": own[0]["regime"],
        "seeds": [row["seed"] for row in own],
        "exit_accuracy": [
            mean(of_seeds) for of_seeds in zip(*(row["exit_accuracy"] for row in own), strict=True)
        ],
        "adaptive_accuracy": mean(adaptive),
        "lowest_and_highest": [min(adaptive), max(adaptive)],
        "mean_macs_share": mean(row["mean_macs_share"] for row in own),
    }


def chosen_regimes(only: str | None, epochs: int) -> dict[str, dict[str, Any]]:
    """Those asked for, all of them if None; refuses names that are none."""
    known = regimes(epochs)
    names = list(known) if only is None else [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(
            f"expected regimes among {', '.join(known)}; got {', '.join(unknown)}"
        )
    return {name: known[name] for name in names}


def print_results(results: list[dict[str, Any]], start_accuracy: float, title: str) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, show_edge=False)
    exits = [f"exit {k}" for k in range(len(results[0]["exit_accuracy"]))]
    table.add_column("regime")
    for column in (*exits, "adaptive", "spread", "MACs"):
        table.add_column(column, justify="right")
    for row in results:
        low, high = row["lowest_and_highest"]
        table.add_row(
            row["regime"],
            *(f"{100 * accuracy:.2f}" for accuracy in row["exit_accuracy"]),
            f"{100 * row['adaptive_accuracy']:.2f}",
            f"{100 * (high - low):.2f}",
            f"{100 * row['mean_macs_share']:.1f} %",
        )
    Console().print(table)
    print(f"accuracies on test in %; the start's final exit has {100 * start_accuracy:.2f}")


def main(
    start: Annotated[Path, typer.Argument(help="A trained run folder, plain or adaptive.")],
    only: Annotated[str | None, typer.Option(metavar="REGIME,...", help="All if left out.")] = None,
    epochs: Annotated[int, typer.Option(min=2, help="Of each regime.")] = 2,
    seeds: Annotated[str, typer.Option(metavar="S,...", help="Of exits and order.")] = "0,1",
    train_samples: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20_000,
    learning_rate: Annotated[float, typer.Option(help="At the start of each regime.")] = 0.01,
    budget_share: Annotated[float, typer.Option(help="Of the plain network's MACs.")] = 0.55,
    data: Annotated[str | None, typer.Option(help="Folder with the Parquet files.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="That torch computes with.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    wanted = chosen_regimes(only, epochs)
    task = read_task(start, data=data, num_train=train_samples, budget_share=budget_share)
    check_start(task)
    joint = settings_of_joint(task.recipe, epochs=epochs, learning_rate=learning_rate)
    settings = describe(task, start, joint)
    rows = rows_before(json_file, settings, epochs)
    before = collect(task.start, task.test).correct_KN[-1].double().mean().item()
    measured = {(row["regime"], row["seed"]) for row in rows}
    for seed in (int(part) for part in seeds.split(",")):
        for regime, changes in wanted.items():
            if (regime, seed) in measured:
                continue
            row = measure(task, replace(joint, seed=seed, **changes))
            print(f"{regime}, seed {seed}: {100 * row['adaptive_accuracy']:.2f} %", flush=True)
            rows.append({"regime": regime, "seed": seed, "changes": changes, **row})
            if json_file is not None:
                content = {**circumstances(), **settings, "start_accuracy": before}
                write_json({**content, "results": summarise(rows), "rows": rows}, json_file)
    title = f"{task.recipe.name} from {start.name}: {epochs} epochs of {len(task.train):,} samples"
    print_results(summarise(rows), before, title)


if __name__ == "__main__":
    typer.run(main)
