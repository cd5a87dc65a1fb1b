"""How much does each reward save? Short phases of reinforcement learning from one start.

START_RUN is a run of a network that skips blocks, trained by the labels alone (offramp train
emnist-skipnet --set reward_epochs=0). Each row starts from it anew and trains a few epochs by
labels and reward together, with its own alpha (what skipping every block earns). Beside them stand
the start itself, and, with --from-scratch, an untrained network that the reward alone trains.

Each row is judged on test data at every gate threshold; the table shows one half, as the gates
were trained, and the cheapest threshold that loses at most --max-drop against the start with all
its blocks run. MACs count the gates, as a share of the plain network's. FILE is written after each
row; what it holds from the same settings is not trained again.

    OFFRAMP_DATA=... python benchmarks/alphas.py START_RUN [--alphas 0.25,0.5,1,2] [--epochs 2]
        [--policy-weight W] [--learning-rate R] [--no-baseline] [--from-scratch] [--seeds 0]
        [--device cpu|cuda] [--out DIR] [--json FILE]
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from offramp import fit, load
from offramp.data.images import make_loader
from offramp.evaluation.sweeping import collect_sweep
from offramp.families.skip import SkipRunner
from offramp.model.checkpoint import save_weights
from offramp.model.inputs import as_inputs
from offramp.recipes.recipe import Recipe
from offramp.routing.skip import SkipNetwork
from offramp.runs.run import (
    WEIGHTS_FILE,
    Run,
    create_folder,
    load_batches,
    load_training_data,
    write_recipe,
)
from offramp.training.config import FitConfig, GateConfig
from record import circumstances, read_rows, write_json

THRESHOLDS = tuple(step / 10 for step in range(11))
AS_TRAINED = 0.5


def judge(network: SkipNetwork, test: DataLoader[Any], device: str) -> dict[str, Any]:
    """Accuracy and MACs at every threshold, and how often each block runs at one half."""
    sweep = collect_sweep(network.to(device), test, THRESHOLDS)
    return {
        "thresholds": list(sweep.thresholds),
        "accuracy": sweep.accuracy_K.tolist(),
        "macs_share": (sweep.mean_macs_K / sweep.plain_macs).tolist(),
        "run_rates": run_rates(network, test, device),
    }


def run_rates(network: SkipNetwork, test: DataLoader[Any], device: str) -> list[float]:
    """How often each gate runs its block as it was trained."""
    runner = SkipRunner(network)
    ran = [runner.run(*as_inputs(inputs, device=device)).blocks for inputs, _ in test]
    return torch.cat([blocks for blocks in ran if blocks is not None]).double().mean(0).tolist()


def configs(
    fit_config: FitConfig, gates: GateConfig, alphas: list[float], *, from_scratch: bool
) -> dict[str, FitConfig]:
    """How each row is trained, by its name."""
    named = {
        f"alpha {alpha:g}": replace(fit_config, gates=replace(gates, alpha=alpha))
        for alpha in alphas
    }
    if from_scratch:
        alone = replace(gates, alpha=alphas[0], supervised=False)
        named["reward alone, from scratch"] = replace(fit_config, gates=alone)
    return named


def fresh(recipe: Recipe, start: SkipNetwork, *, from_scratch: bool) -> SkipNetwork:
    """A network of the recipe: the start's weights, or untrained."""
    network = recipe.build_network()
    assert isinstance(network, SkipNetwork)
    if not from_scratch:
        network.load_state_dict(start.state_dict())
    return network


def keep(network: SkipNetwork, folder: Path, start: Run, config: FitConfig) -> None:
    """Leave a row's network as a run folder, for evaluate, calibrate and export."""
    recipe = replace(start.require_recipe(), fit=config)
    create_folder(folder)
    write_recipe(folder, recipe=recipe, class_names=start.class_names, data=start.data)
    save_weights(network, folder / WEIGHTS_FILE)


def is_of(row: dict[str, Any], seed: int, gates: GateConfig) -> bool:
    """Whether a row was trained so; one of before a setting was there had its default."""
    return "gates" in row and (row["seed"], GateConfig(**row["gates"])) == (seed, gates)


def at_half(row: dict[str, Any]) -> int:
    index: int = row["thresholds"].index(AS_TRAINED)
    return index


def cheapest(row: dict[str, Any], least_accuracy: float) -> int | None:
    """The cheapest threshold that is accurate enough; None where none is."""
    enough = [k for k, accuracy in enumerate(row["accuracy"]) if accuracy >= least_accuracy]
    return min(enough, key=lambda k: row["macs_share"][k], default=None)


def print_results(rows: list[dict[str, Any]], max_drop: float, title: str) -> None:
    start = rows[0]
    least = start["accuracy"][start["thresholds"].index(0.0)] - max_drop
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, show_edge=False)
    table.add_column("trained by")
    columns = ("blocks run", "accuracy", "MACs", f"MACs within {100 * max_drop:g} points")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        half, found = at_half(row), cheapest(row, least)
        table.add_row(
            f"{row['name']}, seed {row['seed']}",
            f"{100 * sum(row['run_rates']) / len(row['run_rates']):.1f} %",
            f"{100 * row['accuracy'][half]:.2f} %",
            f"{100 * row['macs_share'][half]:.1f} %",
            "-" if found is None else f"{100 * row['macs_share'][found]:.1f} %",
        )
    Console().print(table)


def main(
    start: Annotated[Path, typer.Argument(help="A run trained by the labels alone.")],
    alphas: Annotated[str, typer.Option(metavar="A,...", help="Rewards.")] = "0.25,0.5,1,2",
    epochs: Annotated[int, typer.Option(min=1, help="Of each row.")] = 2,
    policy_weight: Annotated[float | None, typer.Option(help="As the recipe if left out.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="As the recipe if left out.")] = None,
    settled: Annotated[int, typer.Option(help="Of the epochs, the last, gates still.")] = 0,
    baseline: Annotated[bool | None, typer.Option(help="As the recipe if left out.")] = None,
    self_critical: Annotated[bool | None, typer.Option(help="As the recipe if left out.")] = None,
    run_target: Annotated[float, typer.Option(help="Share of blocks; 0: none, alpha decides.")] = 0,
    from_scratch: Annotated[bool, typer.Option(help="Add reward alone, untrained.")] = False,
    seeds: Annotated[str, typer.Option(metavar="S,...", help="Of order and draws.")] = "0",
    max_drop: Annotated[float, typer.Option(help="For the last column.")] = 0.003,
    data: Annotated[str | None, typer.Option(help="Folder with the Parquet files.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Leave each network there, a run.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    loaded = load(start)
    recipe = loaded.require_recipe()
    if not isinstance(loaded.network, SkipNetwork) or recipe.fit.gates is None:
        raise typer.BadParameter(f"expected a run of a network that skips blocks; got {start}")
    train, _, _ = load_training_data(recipe, data or loaded.data)
    test = make_loader(load_batches(recipe, "test", data or loaded.data)[0], batch_size=1000)
    given = {
        "reward_learning_rate": learning_rate,
        "policy_weight": policy_weight,
        "baseline": baseline,
        "self_critical": self_critical,
    }
    gates = replace(
        recipe.fit.gates,
        reward_epochs=epochs,
        settled_epochs=settled,
        run_target=run_target,
        **{key: value for key, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    fit_config = replace(recipe.fit, epochs=epochs, device=device, gates=gates)  # type: ignore[arg-type]
    digest = hashlib.sha256((start / WEIGHTS_FILE).read_bytes()).hexdigest()
    settings = {"start": start.name, "start_sha256": digest}
    rows = read_rows(json_file, settings)
    if not rows:
        rows = [{"name": "start", "seed": recipe.fit.seed, **judge(loaded.network, test, device)}]
    named = configs(
        fit_config, gates, [float(a) for a in alphas.split(",")], from_scratch=from_scratch
    )
    for seed in (int(part) for part in seeds.split(",")):
        for name, config in named.items():
            if any(is_of(row, seed, config.gates) for row in rows):
                continue
            network = fresh(recipe, loaded.network, from_scratch=not config.gates.supervised)
            fit(network, train, config=replace(config, seed=seed))
            if out is not None:
                keep(
                    network, out / f"{recipe.name}-{name}-{seed}".replace(" ", "-"), loaded, config
                )
            how = asdict(config.gates)
            row = {"name": name, "seed": seed, "gates": how, **judge(network, test, device)}
            rows.append(row)
            half = at_half(row)
            print(
                f"{name}, seed {seed}: {100 * row['accuracy'][half]:.2f} % at "
                f"{100 * row['macs_share'][half]:.1f} % of the MACs",
                flush=True,
            )
            if json_file is not None:
                write_json({**circumstances(), **settings, "rows": rows}, json_file)
    print_results(rows, max_drop, f"{recipe.name} from {start.name}")


if __name__ == "__main__":
    typer.run(main)
