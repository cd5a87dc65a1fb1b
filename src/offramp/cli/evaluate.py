"""``offramp evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.options import (
    DataOption,
    DeviceOption,
    JsonOption,
    RunFolder,
    percent,
    pick_device,
    write_figures,
)
from offramp.errors import InSampleError, InvalidArgumentError

if TYPE_CHECKING:
    from offramp.inference.evaluate import Evaluation
    from offramp.training.recipes import Recipe
    from offramp.training.run import Run


def evaluate(
    run: RunFolder,
    split: Annotated[str, typer.Option(help="A split of the data, or calibration.")] = "test",
    data: DataOption = None,
    plain: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A plain network trained as long, to stand beside."),
    ] = None,
    in_sample: Annotated[
        bool, typer.Option("--in-sample", help="Report on data that training or thresholds saw.")
    ] = False,
    json_file: JsonOption = None,
    device: DeviceOption = None,
) -> None:
    """Report accuracy and share of samples per exit, and the mean MACs, on held-out data."""
    from offramp.calibration.collect import collect
    from offramp.inference.evaluate import evaluate as measure
    from offramp.inference.runner import AdaptiveRunner
    from offramp.training.data import make_loader
    from offramp.training.run import is_in_sample, load, load_batches

    loaded = load(run)
    recipe = loaded.require_recipe()
    batches, _, fingerprint = load_batches(recipe, split, data or loaded.data)
    seen = is_in_sample(loaded, split, fingerprint)
    if seen and not in_sample:
        raise InSampleError(
            f"The samples of {split} trained {run} or chose its thresholds: figures on them would "
            "be too good. Use --split test, or --in-sample to see them labelled as such."
        )
    where = pick_device(device)

    def figures(evaluated: Run, plain_accuracy: float | None = None) -> Evaluation:
        network = evaluated.network.to(where)
        runner = AdaptiveRunner(network, evaluated.policy)
        loader = make_loader(batches.augmented(None), batch_size=256)
        on_device = ((inputs.to(where), labels) for inputs, labels in loader)
        return measure(runner, on_device, collect(network, loader), plain_accuracy=plain_accuracy)

    plain_accuracy = None if plain is None else figures(_rival(plain, recipe)).final_exit_accuracy
    evaluation = figures(loaded, plain_accuracy)
    content = {"recipe": recipe.name, "split": split, **evaluation.to_dict()}
    if seen:
        content["in_sample"] = True
    if json_file != "-":
        _print_table(evaluation, label=f"{recipe.name}, {split}" + " (IN SAMPLE)" * seen)
    if json_file is not None:
        write_figures(content, json_file)


def _rival(folder: Path, recipe: Recipe) -> Run:
    """The plain network to stand beside: one exit, same data."""
    from offramp.training.run import load

    rival = load(folder)
    if rival.network.num_exits != 1 or rival.require_recipe().data != recipe.data:
        raise InvalidArgumentError(
            f"--plain must name a run with one exit on {recipe.data}. {folder} has "
            f"{rival.network.num_exits} on {rival.require_recipe().data}: train one with "
            f"offramp train {recipe.name} --set variant=plain, or variant=static."
        )
    return rival


def _print_table(evaluation: Evaluation, *, label: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{label}, {evaluation.num_samples:,} samples")
    for column in ("exit", "accuracy alone", "samples leaving", "MACs"):
        table.add_column(column, justify="right")
    for row in evaluation.exits:
        table.add_row(str(row.index), percent(row.accuracy), percent(row.share), f"{row.macs:,}")
    Console().print(table)
    print(f"accuracy with early exit  {percent(evaluation.accuracy)}")
    print(f"final exit alone          {percent(evaluation.final_exit_accuracy)}")
    if evaluation.plain_accuracy is not None:
        print(f"plain network             {percent(evaluation.plain_accuracy)}")
    saved = 1 - evaluation.mean_macs / evaluation.plain_macs
    print(
        f"mean MACs                 {evaluation.mean_macs:,.0f}, plain network "
        f"{evaluation.plain_macs:,}: {percent(abs(saved))} {'saved' if saved >= 0 else 'more'}"
    )
