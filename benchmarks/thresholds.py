"""Choosing thresholds within a budget: does Offramp's search beat the ways that others have?

The pool of cached logits is split into calibration and test data again and again. For ten budgets
between the first exit's cost and the plain network's, thresholds are chosen on calibration data and
judged on test data:

- search: Offramp's thresholds;
- geometric: MSDNet's search, exit shares that grow or fall by a constant factor;
- shared: one threshold for all exits;
- controller: Offramp's learned controller, its thresholds searched alike; the MACs of its scorers
  are counted.

One is judged against another at the MACs that it spent on test data: the other's curve of accuracy
against mean MACs, over a dense set of settings, is read there. Mean differences over the re-splits,
in points, with two standard errors. Bars: better on average, and at no budget worse by more than
0.1 points plus two standard errors.

    python benchmarks/thresholds.py [--splits 20] [--calibration 5000] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from offramp import ExitLogits, calibrate
from offramp.calibration.controller import fit_controller
from offramp.calibration.rules import Rule
from offramp.calibration.search import evaluate_thresholds
from offramp.calibration.thresholds import Calibration, confidences
from pools import NAMES, read_pool, rivals
from record import circumstances, write_json

NUM_BUDGETS = 10
FACTORS = np.geomspace(0.02, 20, 60)
"""Of MSDNet's exit shares; its own search bisects for the budget, a curve serves as well."""

CURVE_POINTS = 40
"""Budgets of the search's curve, which the controller is set against."""

WORST_POINTS = 0.1
Floats = npt.NDArray[np.float64]


def curve(logits: ExitLogits, rule: str, candidates: Sequence[tuple[float, ...]]) -> Floats:
    """Mean MACs (growing) and accuracy of candidates on test data, shape (2, J)."""
    confidence_KN = confidences(logits, logits.policies(rule)[0])
    correct_KN = logits.correct_KN.numpy().astype(np.float64)
    points = {
        evaluate_thresholds(confidence_KN, correct_KN, logits.costs, thresholds)[::-1]
        for thresholds in candidates
    }
    return np.array(sorted(points)).T


def compare(
    calibration: ExitLogits, test: ExitLogits, budgets: Sequence[float], rule: str
) -> dict[str, list[float]]:
    """What the search reaches at each budget, and who is better by how much at the same MACs."""
    confidence_KN = confidences(calibration, calibration.policies(rule)[0])
    dense = np.geomspace(budgets[0], budgets[-1], CURVE_POINTS).tolist()
    searched = [calibrate(calibration, budget_macs=macs, rule=rule).policy for macs in dense]
    geometric = [rivals.geometric_shares(confidence_KN, factor) for factor in FACTORS]
    curves = {
        "geometric": curve(test, rule, geometric),
        "shared": curve(test, rule, rivals.shared_thresholds(confidence_KN)),
        "search": curve(test, rule, [policy.thresholds for policy in searched]),
    }

    def reach(how: Rule) -> list[Calibration]:
        policies = [calibrate(calibration, budget_macs=macs, rule=how).policy for macs in budgets]
        return [test.measure(policy) for policy in policies]

    def gains(found: list[Calibration], over: str) -> list[float]:
        macs_J, accuracy_J = curves[over]
        return [f.accuracy - float(np.interp(f.mean_macs, macs_J, accuracy_J)) for f in found]

    search, controller = reach(rule), reach(fit_controller(calibration))
    return {
        "mean_macs": [found.mean_macs for found in search],
        "accuracy": [found.accuracy for found in search],
        "search over geometric": gains(search, "geometric"),
        "search over shared": gains(search, "shared"),
        "controller over search": gains(controller, "search"),
    }


def summarise(splits: Sequence[dict[str, list[float]]], name: str) -> dict[str, Any]:
    """Mean and two standard errors, in points, of how much better the one is than the other."""
    points = 100 * np.array([split[name] for split in splits])
    two_errors = 2 * points.std(0, ddof=1) / np.sqrt(len(points))
    worst = float((points.mean(0) + two_errors).min())
    return {
        "mean_points": float(points.mean()),
        "mean_two_errors": float(2 * points.mean(1).std(ddof=1) / np.sqrt(len(points))),
        "points": points.mean(0).tolist(),
        "two_errors": two_errors.tolist(),
        "bar_met": bool(points.mean() > 0 and worst > -WORST_POINTS),
    }


def measure(name: str, *, num_splits: int, num_calibration: int, rule: str) -> dict[str, Any]:
    """Compare on every re-split of one network's logits."""
    pool = read_pool(name)
    plain_macs, num_samples = pool.costs.plain_macs, len(pool.labels_N)
    budgets = np.linspace(pool.costs.exit_macs()[0], plain_macs, NUM_BUDGETS + 2)[1:-1].tolist()
    splits = []
    for seed in track(range(num_splits), description=name, transient=True):
        drawn = np.random.default_rng(seed).permutation(num_samples)
        halves = (pool.take(rows) for rows in np.split(drawn, [num_calibration]))
        splits.append(compare(*halves, budgets, rule))
    return {
        "network": name,
        "budget_shares": [budget / plain_macs for budget in budgets],
        "realised_shares": (np.mean([s["mean_macs"] for s in splits], 0) / plain_macs).tolist(),
        "accuracy": np.mean([s["accuracy"] for s in splits], 0).tolist(),
        "gains": {name: summarise(splits, name) for name in splits[0] if " over " in name},
    }


def print_result(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['network']}: points better on test", box=box.SIMPLE_HEAD)
    for column in ("budget", "realised", "accuracy", *result["gains"]):
        table.add_column(column, justify="right")
    for i, budget in enumerate(result["budget_shares"]):
        table.add_row(
            f"{100 * budget:.0f} %",
            f"{100 * result['realised_shares'][i]:.1f} %",
            f"{100 * result['accuracy'][i]:.2f} %",
            *(
                f"{r['points'][i]:+.2f} ± {r['two_errors'][i]:.2f}"
                for r in result["gains"].values()
            ),
        )
    verdicts = {True: "met", False: "MISSED"}
    means = (
        f"{r['mean_points']:+.2f} ± {r['mean_two_errors']:.2f} {verdicts[r['bar_met']]}"
        for r in result["gains"].values()
    )
    table.add_row("mean", "", "", *means)
    Console().print(table)


def main(
    splits: Annotated[int, typer.Option(min=2, help="Re-splits of the pool.")] = 20,
    calibration: Annotated[int, typer.Option(min=100, help="Samples that choose.")] = 5000,
    rule: Annotated[str, typer.Option(help="Confidence function of all contenders.")] = "entropy",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    torch.set_num_threads(1)
    results = []
    for name in NAMES:
        results.append(measure(name, num_splits=splits, num_calibration=calibration, rule=rule))
        print_result(results[-1])
    if json_file is not None:
        about = {"splits": splits, "calibration": calibration, "rule": rule}
        write_json({**circumstances(), **about, "results": results}, json_file)


if __name__ == "__main__":
    typer.run(main)
