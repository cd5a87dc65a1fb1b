"""``offramp frontier``."""

from __future__ import annotations

from collections.abc import Sequence

from offramp.cli.options import Frontier, write_figures
from offramp.tables import Table, percent
from offramp.workflow import frontier as workflow
from offramp.workflow.frontier import Curve


def frontier(asked: Frontier) -> None:
    """Print a curve for each run."""
    workflow.check_asked(asked.split, asked.points, asked.rule)
    opened = workflow.open_all(asked.runs, asked.device, asked.network)
    curves: list[Curve] = []
    for run in opened:
        curve = workflow.follow(
            run,
            asked.split,
            data=asked.data,
            subset=asked.subset,
            num_points=asked.points,
            rule=asked.rule,
        )
        curves.append(curve)
        workflow.check_same_samples(curves)
        if asked.json_file != "-":
            _print_curve(curve)
    if asked.json_file != "-" and len(curves) > 1:
        _print_areas(curves)
    if asked.json_file is not None:
        rules = [curve.rule for curve in curves if curve.rule is not None]
        about = {
            "split": curves[0].split,
            "data": opened[0].samples.name,
            "rule": (*rules, "entropy")[0],
        }
        write_figures(about | {"runs": [curve.to_dict() for curve in curves]}, asked.json_file)


def _print_curve(curve: Curve) -> None:
    found = curve.frontier
    print(found.to_text(f"{curve.run.name}, {curve.split}, {curve.num_samples:,} samples"))
    if len(found.exits) > 1 or curve.run.thresholds is not None:
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
