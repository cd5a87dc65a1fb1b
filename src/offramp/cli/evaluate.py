"""``offramp evaluate``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from offramp.calibration.asked import Asked
from offramp.cli.options import Evaluate, write_figures
from offramp.errors import InSampleError, InvalidArgumentError
from offramp.evaluation.evaluate import evaluate as evaluate_runner
from offramp.evaluation.figures import Evaluation, Rival
from offramp.workflow.artifact import Artifact, open_artifact


def evaluate(asked: Evaluate) -> None:
    """Print the figures of a run or a bundle."""
    figures = measure(asked)
    if asked.json_file is not None:
        write_figures(figures, asked.json_file)


def measure(asked: Evaluate) -> dict[str, Any]:
    """Evaluate a run or a bundle."""
    opened = open_artifact(asked.run, asked.device, asked.network)
    samples = opened.samples.load(asked.split, data=asked.data, subset=asked.subset)
    judged: Any = samples.batches
    split = samples.split
    why = opened.why_in_sample(samples)
    if why is not None and not asked.in_sample:
        judging = opened.samples.judging_split
        other = "another split" if judging is None else f"--split {judging}"
        raise InSampleError(
            f"{why}: figures on them can be too good. Use {other}, or --in-sample to see them "
            "labelled as such."
        )
    if opened.note is not None:
        print(opened.note, file=sys.stderr)

    def figures(of: Artifact, target: Asked | None = None) -> Evaluation:
        found: Evaluation = evaluate_runner(of.runner, judged, asked=target)
        return found

    beside = {}
    if asked.plain is not None:
        beside = _beside(asked.plain, figures(_open_rival(asked.plain, asked.device, opened)))
    evaluation = replace(figures(opened, opened.target), **beside)
    content = {"recipe": opened.recipe, "split": split, **evaluation.to_dict()}
    if opened.recipe is None:
        content["data"] = samples.name
    if why is not None:
        content["in_sample"] = True
    if asked.json_file != "-":
        print(evaluation.to_text(f"{opened.name}, {split}" + " (IN SAMPLE)" * (why is not None)))
    return content


def _beside(run: Path, rival: Evaluation) -> dict[str, Any]:
    """Name a rival's figures as its own."""
    return {
        "plain_accuracy": rival.final_exit_accuracy,
        "plain_mean_iou": rival.final_exit_mean_iou,
        "rival": Rival(name=run.resolve().name, macs=rival.plain_macs),
    }


def _open_rival(folder: Path, device: str | None, asked: Artifact) -> Artifact:
    """The plain network to stand beside: one exit, no gates, no halting, same data."""
    rival, data = open_artifact(folder, device), asked.samples.name
    thresholds = rival.thresholds
    if rival.num_exits != 1 or thresholds is not None or rival.samples.name != data:
        trained = asked.recipe or "RECIPE"
        routed = "" if thresholds is None else " and gates or halting tokens"
        raise InvalidArgumentError(
            f"--plain must name a run with one exit, no gates and no halting on {data}. "
            f"{folder} has {rival.num_exits}{routed} on {rival.samples.name}: train one with "
            f"offramp train {trained} --set variant=plain, or variant=static."
        )
    return rival
