"""``offramp frontier``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.artifact import is_bundle, open_artifact
from offramp.cli.choosing import rule_named
from offramp.cli.choosing_pixels import default_rule
from offramp.cli.options import (
    DataOption,
    DeviceOption,
    JsonOption,
    pick_device,
    write_figures,
)
from offramp.errors import InSampleError, InvalidArgumentError
from offramp.tables import Table, percent

if TYPE_CHECKING:
    from offramp.calibration.frontier import Frontier
    from offramp.calibration.temperature import ExitCalibration
    from offramp.cli.artifact import Loader
    from offramp.training.recipes import Recipe


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
    from offramp.training.sources import SOURCES

    _check_asked(split, points, rule)
    opened = [_open(folder, device) for folder in runs]
    _require_one_data_set(opened)
    split = split or SOURCES[opened[0].recipe.data].judging_split
    curves: list[_Curve] = []
    for run in opened:
        curve = _follow(run, split, data, num_points=points, rule=rule)
        _require_same_samples([*curves, curve], split)
        curves.append(curve)
        if json_file != "-":
            _print_curve(curve, split)
    if json_file != "-" and len(curves) > 1:
        _print_areas(curves)
    if json_file is not None:
        rules = [curve.rule for curve in curves if curve.rule is not None]
        about = {"split": split, "data": opened[0].recipe.data, "rule": (*rules, "entropy")[0]}
        write_figures(about | {"runs": [curve.to_dict() for curve in curves]}, json_file)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A run or a bundle, calibrated or not.

    Attributes:
        name: As it was given.
        recipe: How it was trained.
        data: What ``--data`` was then; None for the default.
        num_exits: Exits of the network, those that are off in a bundle counted.
        is_steered: Whether it skips blocks or drops tokens, by one threshold.
        collect: From a loader to the logits of every exit; of those that are on, for a bundle; at
            every threshold, where one steers the network.
    """

    name: str
    recipe: Recipe
    data: str | None
    num_exits: int
    is_steered: bool
    collect: Callable[[Loader], Any]


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """What one run adds to the plot.

    Attributes:
        run: The run.
        rule: How sure an exit is; None without exits.
        frontier: Its points.
        reliability: Of each exit, temperatures fitted on calibration data and judged on test;
            None without calibration data or exits.
        num_samples: That judged.
        num_calibration_samples: That chose the thresholds.
        fingerprint: Identifies the samples that judged.
    """

    run: _Opened
    rule: str | None
    frontier: Frontier
    reliability: tuple[ExitCalibration, ...] | None
    num_samples: int
    num_calibration_samples: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON."""
        reliability = None if self.reliability is None else [r.to_dict() for r in self.reliability]
        return {
            "run": self.run.name,
            "recipe": self.run.recipe.name,
            "num_samples": self.num_samples,
            "num_calibration_samples": self.num_calibration_samples,
            **self.frontier.to_dict(),
            "reliability": reliability,
        }


def _check_asked(split: str | None, num_points: int, rule: str | None) -> None:
    """Refuse what needs no data to be refused."""
    from offramp.calibration.frontier import check_num_points
    from offramp.training.run import CALIBRATION_SPLIT

    if split in ("train", CALIBRATION_SPLIT):
        raise InSampleError(
            f"The samples of {split} train the runs or choose their thresholds: a curve on them "
            "would be too good. Use --split test."
        )
    check_num_points(num_points)
    if rule is not None:
        rule_named(rule)


def _open(folder: Path, device: str | None) -> _Opened:
    from offramp.calibration.collect import collect
    from offramp.families import family_of
    from offramp.inference.sweeping import collect_sweep
    from offramp.training.run import load

    if is_bundle(folder):
        bundle = open_artifact(folder, device)
        if bundle.family.thresholds is not None:
            raise InvalidArgumentError(
                f"The bundle {folder} skips blocks or drops tokens, and is not run at other "
                "thresholds. Give the run that it was exported from."
            )
        return _Opened(
            name=str(folder),
            recipe=bundle.recipe,
            data=bundle.data,
            num_exits=bundle.num_exits,
            is_steered=False,
            collect=bundle.collect,
        )
    loaded = load(folder)
    network = loaded.network.to(pick_device(device))
    is_steered = family_of(network).thresholds is not None
    collect_all = partial(collect_sweep if is_steered else collect, network)
    return _Opened(
        name=str(folder),
        recipe=loaded.require_recipe(),
        data=loaded.data,
        num_exits=network.num_exits,
        is_steered=is_steered,
        collect=collect_all,
    )


def _require_one_data_set(opened: Sequence[_Opened]) -> None:
    first, *others = opened
    for run in others:
        if run.recipe.data != first.recipe.data:
            raise InvalidArgumentError(
                "Expected runs of one data set: curves on different data do not belong in one "
                f"plot. Got {first.name} on {first.recipe.data} and {run.name} on "
                f"{run.recipe.data}."
            )


def _require_same_samples(curves: Sequence[_Curve], split: str) -> None:
    first, last = curves[0], curves[-1]
    if last.fingerprint != first.fingerprint:
        raise InvalidArgumentError(
            f"Expected one {split} split for all runs. Got {first.num_samples:,} samples for "
            f"{first.run.name} and {last.num_samples:,} others for {last.run.name}: give all runs "
            "the same with --data DIR."
        )


def _follow(
    run: _Opened, split: str, data: str | None, *, num_points: int, rule: str | None
) -> _Curve:
    """Collect what the network says on both splits, and choose on the one for the other."""
    from offramp.calibration.frontier import frontier as measure
    from offramp.calibration.frontier import sweep_frontier
    from offramp.calibration.temperature import describe_temperatures, fit_temperatures
    from offramp.training.run import CALIBRATION_SPLIT

    calibration: Any = None
    reliability = None
    if run.num_exits > 1 or run.is_steered or run.recipe.calibration_share > 0:
        calibration, _ = _collect(run, CALIBRATION_SPLIT, data)
    test, fingerprint = _collect(run, split, data)
    if run.is_steered:
        found = sweep_frontier(calibration, test, num_points=num_points)
    else:
        rule = rule or default_rule(test.is_dense)
        found = measure(calibration, test, num_points=num_points, rule=rule_named(rule))
        if calibration is not None:
            reliability = describe_temperatures(test, fit_temperatures(calibration))
    return _Curve(
        run=run,
        rule=None if run.is_steered else rule,
        frontier=found,
        reliability=reliability,
        num_samples=len(test.labels_N),
        num_calibration_samples=0 if calibration is None else len(calibration.labels_N),
        fingerprint=fingerprint,
    )


def _collect(run: _Opened, split: str, data: str | None) -> tuple[Any, str]:
    from offramp.training.data import make_loader
    from offramp.training.run import load_batches

    batches, _, fingerprint = load_batches(run.recipe, split, data or run.data)
    return run.collect(make_loader(batches, batch_size=batches.run_batch_size)), fingerprint


def _print_curve(curve: _Curve, split: str) -> None:
    found = curve.frontier
    print(found.to_text(f"{curve.run.name}, {split}, {curve.num_samples:,} samples"))
    if len(found.exits) > 1 or curve.run.is_steered:
        print(
            f"thresholds chosen on {curve.num_calibration_samples:,} calibration samples"
            + ("" if curve.rule is None else f", rule {curve.rule}")
        )


def _print_areas(curves: Sequence[_Curve]) -> None:
    """Beside the cost that each area goes up to: only areas of equal ones compare."""
    rows = [
        (curve.run.name, percent(curve.frontier.area), f"{curve.frontier.plain_macs:,}")
        for curve in curves
    ]
    print("\nareas, each up to its own plain network's MACs\n")
    print(Table(("run", "area", "plain MACs"), rows, words=1))
