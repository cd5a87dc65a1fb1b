"""``offramp evaluate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from offramp.calibration.asked import Asked
from offramp.cli.options import Evaluate, write_figures
from offramp.data.images import make_loader
from offramp.data.sources import SOURCES
from offramp.errors import InSampleError, InvalidArgumentError
from offramp.evaluation.evaluate import evaluate as evaluate_runner
from offramp.evaluation.figures import Evaluation, Rival
from offramp.runs.run import load_batches
from offramp.workflow.artifact import Artifact, open_artifact


def evaluate(asked: Evaluate) -> None:
    """Print the figures of a run or a bundle."""
    figures = measure(asked)
    if asked.json_file is not None:
        write_figures(figures, asked.json_file)


def measure(asked: Evaluate) -> dict[str, Any]:
    """Evaluate a run or a bundle."""
    opened = open_artifact(asked.run, asked.device)
    recipe = opened.recipe
    split = asked.split or SOURCES[recipe.data].judging_split
    batches, _, fingerprint = load_batches(recipe, split, asked.data or opened.data)
    seen = opened.has_seen(split, fingerprint)
    if seen and not asked.in_sample:
        raise InSampleError(
            f"The samples of {split} trained {asked.run} or may have chosen its thresholds: "
            "figures on them can be too good. Use --split "
            f"{SOURCES[recipe.data].judging_split}, or --in-sample to see them labelled as such."
        )

    def figures(of: Artifact, target: Asked | None = None) -> Evaluation:
        loader = make_loader(batches.unaugmented(), batch_size=batches.run_batch_size)
        on_device = ((inputs.to(of.device), labels) for inputs, labels in loader)
        return evaluate_runner(of.runner, on_device, asked=target)

    beside = {}
    if asked.plain is not None:
        beside = _beside(asked.plain, figures(_open_rival(asked.plain, asked.device, opened)))
    evaluation = replace(figures(opened, opened.target), **beside)
    content = {"recipe": recipe.name, "split": split, **evaluation.to_dict()}
    if seen:
        content["in_sample"] = True
    if asked.json_file != "-":
        print(evaluation.to_text(f"{recipe.name}, {split}" + " (IN SAMPLE)" * seen))
    return content


def _beside(run: Path, rival: Evaluation) -> dict[str, Any]:
    """What the figures say of a rival, under its own name."""
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
