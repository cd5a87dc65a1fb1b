"""``offramp frontier``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.options import DataOption, DeviceOption, JsonOption, write_figures
from offramp.tables import Table, percent

if TYPE_CHECKING:
    from offramp.workflow.frontier import Curve


def frontier(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or bundles, of one data.")
    ],
    split: Annotated[
        str | None, typer.Option(help="The split that judges; default the data's last.")
    ] = None,
    data: DataOption = None,
    points: Annotated[
        int, typer.Option(help="Budgets, from the cheapest exit to the plain network.")
    ] = 10,
    rule: Annotated[
        str | None,
        typer.Option(
            help="entropy, max_probability, margin, learned; or, of pixels, as calibrate has them."
        ),
    ] = None,
    json_file: JsonOption = None,
    device: DeviceOption = None,
) -> None:
    """Draw accuracy against mean MACs: thresholds from calibration data, figures from test.

    A run's own policy plays no part. Gates and tokens have no --rule.
    """
    from offramp.workflow import frontier as workflow

    workflow.check_asked(split, points, rule)
    opened = workflow.open_all(runs, device)
    split = split or workflow.judging_split(opened[0])
    curves: list[Curve] = []
    for run in opened:
        curve = workflow.follow(run, split, data=data, num_points=points, rule=rule)
        curves.append(curve)
        workflow.check_same_samples(curves, split)
        if json_file != "-":
            _print_curve(curve, split)
    if json_file != "-" and len(curves) > 1:
        _print_areas(curves)
    if json_file is not None:
        rules = [curve.rule for curve in curves if curve.rule is not None]
        about = {"split": split, "data": opened[0].recipe.data, "rule": (*rules, "entropy")[0]}
        write_figures(about | {"runs": [curve.to_dict() for curve in curves]}, json_file)


def _print_curve(curve: Curve, split: str) -> None:
    found = curve.frontier
    print(found.to_text(f"{curve.run.name}, {split}, {curve.num_samples:,} samples"))
    if len(found.exits) > 1 or curve.run.family.thresholds is not None:
        print(
            f"thresholds chosen on {curve.num_calibration_samples:,} calibration samples"
            + ("" if curve.rule is None else f", rule {curve.rule}")
        )


def _print_areas(curves: Sequence[Curve]) -> None:
    """Beside the cost that each area goes up to: only areas of equal ones compare."""
    rows = [
        (curve.run.name, percent(curve.frontier.area), f"{curve.frontier.plain_macs:,}")
        for curve in curves
    ]
    print("\nareas, each up to its own plain network's MACs\n")
    print(Table(("run", "area", "plain MACs"), rows, words=1))
