"""The options of ``offramp calibrate``, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import typer

from offramp.cli.options import (
    CalibrationSplitOption,
    DataOption,
    DeviceOption,
    NetworkOption,
    RunOrBundle,
    SubsetOption,
)
from offramp.errors import InvalidArgumentError
from offramp.workflow.wanted import LEARNED, Timing, Wanted


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Choose when to stop, skip or drop, on data set aside from training; write it down.

    Into the policy.json of a run, or into a bundle, whose files stay as they are.
    """

    run: RunOrBundle
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="T0,T1,...",
            help="By hand: a number or off, for each exit but the last; one for gates or tokens.",
        ),
    ] = None
    target: Annotated[Wanted, "guarantee", "timing"]
    guarantee: Annotated[
        str | None,
        typer.Option(
            metavar="P|mean",
            help="Keep --max-drop or --max-risk on new samples: with probability P, or on average.",
        ),
    ] = None
    prior: Annotated[
        str | None,
        typer.Option(
            metavar="uniform|FILE",
            help="Weight the samples to these shares of classes (JSON: share by class name).",
        ),
    ] = None
    aim: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="latency",
            help="With --max-drop: time the parts, and switch off exits that do not pay.",
        ),
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(help="Samples a batch, where parts are timed; default 1.")
    ] = None
    backend: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="torch or onnxruntime, which is the default, to time."),
    ] = None
    data: DataOption = None
    split: CalibrationSplitOption = None
    subset: SubsetOption = None
    network: NetworkOption = None
    device: DeviceOption = None

    def __post_init__(self) -> None:
        target = self.target
        targets = (
            self.thresholds,
            target.max_drop,
            target.max_risk,
            target.budget_macs,
            target.budget_share,
            target.budget_ms,
        )
        if sum(value is not None for value in targets) != 1:
            raise InvalidArgumentError(
                "Give exactly one of --thresholds, --max-drop, --max-risk, --budget-macs, "
                "--budget-share and --budget-ms."
            )
        _check_combination(self.wanted, by_hand=self.thresholds is not None)
        if self.thresholds is not None and self.prior is not None:
            raise InvalidArgumentError(
                "--prior weights calibration data, which --thresholds need not."
            )

    @property
    def wanted(self) -> Wanted:
        """The target, with the promise and the clock that the options ask for."""
        return replace(self.target, guarantee=_read_guarantee(self.guarantee), timing=self._timing)

    @property
    def _timing(self) -> Timing | None:
        if self.aim not in (None, "latency"):
            raise InvalidArgumentError(f"--for must be latency. Got {self.aim!r}.")
        if self.aim is not None and self.target.max_drop is None:
            raise InvalidArgumentError(
                "--for latency switches off exits as long as an accuracy target holds: give it "
                "with --max-drop."
            )
        if self.aim is None and self.target.budget_ms is None:
            if self.batch_size is not None or self.backend is not None:
                raise InvalidArgumentError(
                    "--batch-size and --backend are for timing the parts: give --for latency or "
                    "--budget-ms as well."
                )
            return None
        if self.backend not in (None, "torch", "onnxruntime"):
            raise InvalidArgumentError(
                f"--backend must be torch or onnxruntime. Got {self.backend!r}."
            )
        return Timing(
            batch_size=1 if self.batch_size is None else self.batch_size,
            backend=self.backend or "onnxruntime",
        )


def _read_guarantee(text: str | None) -> float | str | None:
    if text is None or text == "mean":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise InvalidArgumentError(
            f"--guarantee must be a probability in (0, 1), or mean. Got {text!r}."
        ) from error


def _check_combination(wanted: Wanted, *, by_hand: bool) -> None:
    """Refuse options that have no meaning together, before anything is computed."""
    if wanted.risk is not None and wanted.max_risk is None:
        raise InvalidArgumentError("--risk says what --max-risk bounds: give both.")
    if wanted.guarantee is not None:
        if wanted.max_drop is None and wanted.max_risk is None:
            raise InvalidArgumentError(
                "--guarantee promises to keep --max-drop or --max-risk: give one of them."
            )
        if wanted.timing is not None:
            raise InvalidArgumentError(
                "--guarantee and --for latency choose in different ways: give one of them."
            )
    if wanted.temperatures not in (None, "all", "survivors"):
        raise InvalidArgumentError(
            f"--temperatures must be all or survivors. Got {wanted.temperatures!r}."
        )
    if wanted.temperatures == "survivors" and wanted.budget_ms is not None:
        raise InvalidArgumentError(
            "--temperatures survivors needs a target that is no time: give --budget-macs, or "
            "--temperatures all."
        )
    ways = {
        "--patience": wanted.patience is not None,
        "--temperatures": wanted.temperatures is not None,
        "--rule learned": wanted.rule == LEARNED,
        "--thresholds": by_hand,
    }
    given = [name for name, is_given in ways.items() if is_given]
    if len(given) > 1:
        raise InvalidArgumentError(f"{given[0]} and {given[1]} do not go together: give one.")
