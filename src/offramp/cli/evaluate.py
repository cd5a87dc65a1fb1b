"""``offramp evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.artifact import Artifact, open_artifact
from offramp.cli.options import (
    DataOption,
    DeviceOption,
    JsonOption,
    RunOrBundle,
    percent,
    write_figures,
)
from offramp.errors import InSampleError, InvalidArgumentError

if TYPE_CHECKING:
    from offramp.inference.evaluate import BlocksEvaluation, Evaluation, TokensEvaluation


def evaluate(
    run: RunOrBundle,
    split: Annotated[
        str | None,
        typer.Option(help="A split of the data, or calibration; default the data's last."),
    ] = None,
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
    """Report accuracy, who leaves where, which blocks or tokens run, and mean MACs."""
    figures = measure(
        run,
        split=split,
        data=data,
        plain=plain,
        in_sample=in_sample,
        device=device,
        show=json_file != "-",
    )
    if json_file is not None:
        write_figures(figures, json_file)


def measure(
    run: Path,
    *,
    split: str | None = None,
    data: str | None,
    plain: Path | None,
    in_sample: bool = False,
    device: str | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Evaluate a run or a bundle.

    Args:
        run: Its folder.
        split: A split of the data, or calibration; the data's last if None.
        data: Where the data is; where the run was trained on if None.
        plain: A plain network trained as long, to stand beside.
        in_sample: Whether data that training or thresholds saw will do.
        device: Where to compute.
        show: Whether to print a table.
    Returns:
        The figures, for JSON.
    Raises:
        InSampleError: If the data were seen, and that will not do.
    """
    from offramp.inference.evaluate import evaluate as evaluate_runner
    from offramp.training.data import make_loader
    from offramp.training.run import load_batches
    from offramp.training.sources import SOURCES

    asked = open_artifact(run, device)
    recipe = asked.recipe
    split = split or SOURCES[recipe.data].judging_split
    batches, _, fingerprint = load_batches(recipe, split, data or asked.data)
    seen = asked.has_seen(split, fingerprint)
    if seen and not in_sample:
        raise InSampleError(
            f"The samples of {split} trained {run} or may have chosen its thresholds: figures on "
            f"them can be too good. Use --split {SOURCES[recipe.data].judging_split}, or "
            "--in-sample to see them labelled as such."
        )

    def figures(of: Artifact, rival: Evaluation | None = None) -> Evaluation:
        loader = make_loader(batches.unaugmented(), batch_size=batches.run_batch_size)
        on_device = ((inputs.to(of.device), labels) for inputs, labels in loader)
        beside = {} if rival is None else _as_plain(rival)
        return evaluate_runner(of.runner, on_device, of.collect(loader), **beside)

    rival = None if plain is None else _open_rival(plain, device, asked)
    evaluation = figures(asked, None if rival is None else figures(rival))
    content = {"recipe": recipe.name, "split": split, **evaluation.to_dict()}
    if seen:
        content["in_sample"] = True
    if show:
        _print_table(evaluation, label=f"{recipe.name}, {split}" + " (IN SAMPLE)" * seen)
    return content


def _as_plain(rival: Evaluation) -> dict[str, float | None]:
    return {
        "plain_accuracy": rival.final_exit_accuracy,
        "plain_mean_iou": rival.final_exit_mean_iou,
    }


def _open_rival(folder: Path, device: str | None, asked: Artifact) -> Artifact:
    """The plain network to stand beside: one exit, no gates, no halting, same data."""
    rival, recipe = open_artifact(folder, device), asked.recipe
    if rival.num_exits != 1 or rival.is_routed or rival.recipe.data != recipe.data:
        routed = " and gates or halting tokens" if rival.is_routed else ""
        raise InvalidArgumentError(
            f"--plain must name a run with one exit, no gates and no halting on {recipe.data}. "
            f"{folder} has {rival.num_exits}{routed} on {rival.recipe.data}: train one with "
            f"offramp train {recipe.name} --set variant=plain, or variant=static."
        )
    return rival


def _print_table(evaluation: Evaluation, *, label: str) -> None:
    from rich.console import Console
    from rich.table import Table

    blocks, tokens = evaluation.blocks, evaluation.tokens
    table = Table(title=f"{label}, {evaluation.num_samples:,} samples")
    columns, rows = _exit_rows(evaluation)
    less, whole = "accuracy with early exit", "final exit alone"
    if blocks is not None:
        columns, rows = _block_rows(blocks)
        less, whole = "accuracy with skipping", "every block run"
    if tokens is not None:
        columns, rows = _layer_rows(tokens)
        less, whole = "accuracy, tokens dropped", "with a threshold of 1"
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    figures = (evaluation.accuracy, evaluation.final_exit_accuracy, evaluation.plain_accuracy)
    if evaluation.mean_iou is not None:
        less = "mean IoU with early exit"
        of_exit, of_plain = evaluation.final_exit_mean_iou, evaluation.plain_mean_iou
        figures = (evaluation.mean_iou, of_exit or 0.0, of_plain)
    for name, figure in zip((less, whole, "plain network"), figures, strict=True):
        if figure is not None:
            print(f"{name:26}{percent(figure)}")
    if blocks is not None:
        print(f"gated blocks run          {percent(1 - blocks.saved)}")
    if tokens is not None:
        depth = f"{tokens.mean_depth:.2f} of {len(tokens.per_layer)} layers"
        print(f"mean depth of a token     {depth}")
    saved = 1 - evaluation.mean_macs / evaluation.plain_macs
    print(
        f"mean MACs                 {evaluation.mean_macs:,.0f}, plain network "
        f"{evaluation.plain_macs:,}: {percent(abs(saved))} {'saved' if saved >= 0 else 'more'}"
    )


Rows = tuple[Sequence[str], list[tuple[str, ...]]]


def _exit_rows(evaluation: Evaluation) -> Rows:
    rows: list[tuple[str, ...]] = [
        (str(row.index), percent(row.accuracy), percent(row.share), f"{row.macs:,}")
        for row in evaluation.exits
    ]
    if evaluation.mean_iou is None:
        return ("exit", "accuracy alone", "samples leaving", "MACs"), rows
    ious = [percent(row.mean_iou) for row in evaluation.exits]
    return ("exit", "mean IoU alone", "pixel accuracy", "images leaving", "MACs"), [
        (number, iou, *others) for iou, (number, *others) in zip(ious, rows, strict=True)
    ]


def _block_rows(blocks: BlocksEvaluation) -> Rows:
    return ("gated block", "samples running it"), [
        (str(index), percent(rate)) for index, rate in enumerate(blocks.run_rates)
    ]


def _layer_rows(tokens: TokensEvaluation) -> Rows:
    every = tokens.per_layer[0]  # all run the first layer
    return ("layer", "tokens in it", "of all"), [
        (str(number), f"{mean:.1f}", percent(mean / every))
        for number, mean in enumerate(tokens.per_layer, start=1)
    ]
