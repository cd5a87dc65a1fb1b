"""``offramp evaluate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import (
    DataOption,
    DeviceOption,
    JsonOption,
    RunOrBundle,
    write_figures,
)
from offramp.errors import InSampleError, InvalidArgumentError
from offramp.workflow.artifact import Artifact, open_artifact

if TYPE_CHECKING:
    from offramp.calibration.asked import Asked
    from offramp.evaluation.figures import Evaluation


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
    """Evaluate a run or a bundle."""
    from offramp.data.images import make_loader
    from offramp.data.sources import SOURCES
    from offramp.evaluation.evaluate import evaluate as evaluate_runner
    from offramp.runs.run import load_batches

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

    def figures(of: Artifact, target: Asked | None = None) -> Evaluation:
        loader = make_loader(batches.unaugmented(), batch_size=batches.run_batch_size)
        on_device = ((inputs.to(of.device), labels) for inputs, labels in loader)
        return evaluate_runner(of.runner, on_device, asked=target)

    beside = {} if plain is None else _beside(plain, figures(_open_rival(plain, device, asked)))
    evaluation = replace(figures(asked, asked.target), **beside)
    content = {"recipe": recipe.name, "split": split, **evaluation.to_dict()}
    if seen:
        content["in_sample"] = True
    if show:
        print(evaluation.to_text(f"{recipe.name}, {split}" + " (IN SAMPLE)" * seen))
    return content


def _beside(run: Path, rival: Evaluation) -> dict[str, Any]:
    """What the figures say of a rival, under its own name."""
    from offramp.evaluation.figures import Rival

    return {
        "plain_accuracy": rival.final_exit_accuracy,
        "plain_mean_iou": rival.final_exit_mean_iou,
        "rival": Rival(name=run.resolve().name, macs=rival.plain_macs),
    }


def _open_rival(folder: Path, device: str | None, asked: Artifact) -> Artifact:
    """The plain network to stand beside: one exit, no gates, no halting, same data."""
    rival, recipe = open_artifact(folder, device), asked.recipe
    thresholds = rival.family.thresholds
    if rival.num_exits != 1 or thresholds is not None or rival.recipe.data != recipe.data:
        routed = "" if thresholds is None else " and gates or halting tokens"
        raise InvalidArgumentError(
            f"--plain must name a run with one exit, no gates and no halting on {recipe.data}. "
            f"{folder} has {rival.num_exits}{routed} on {rival.recipe.data}: train one with "
            f"offramp train {recipe.name} --set variant=plain, or variant=static."
        )
    return rival
