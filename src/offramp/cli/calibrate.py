"""``offramp calibrate``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.choosing import LEARNED, Timing, Wanted, choose, words_of
from offramp.cli.choosing_pixels import (
    default_rule,
    dense_policy_by_hand,
    refuse_pixel_threshold,
)
from offramp.cli.choosing_routing import choose_routing, refuse_exits, set_threshold_by_hand
from offramp.cli.options import DataOption, DeviceOption, RunFolder
from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from offramp.policy.policies import ThresholdedPolicy, ThresholdPolicy
    from offramp.training.run import Run


ThresholdsOption = Annotated[
    str | None,
    typer.Option(
        metavar="T0,T1,...",
        help="By hand: a number or off, for each exit but the last; one for gates or tokens.",
    ),
]
MaxDropOption = Annotated[
    float | None, typer.Option(help="Spend least; lose at most this fraction of accuracy.")
]
MaxRiskOption = Annotated[
    float | None, typer.Option(help="The same for the risk that --risk names.")
]
RiskOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="disagreement (with the final exit), error, brier_gap or accuracy_gap; of pixels "
        "pixel_error_gap.",
    ),
]
GuaranteeOption = Annotated[
    str | None,
    typer.Option(
        metavar="P|mean",
        help="Keep --max-drop or --max-risk on new samples: with probability P, or on average.",
    ),
]
BudgetMacsOption = Annotated[
    float | None, typer.Option(help="Be most accurate at this many mean MACs per sample.")
]
BudgetShareOption = Annotated[
    float | None,
    typer.Option(help="The same as a share of the plain network's MACs, e.g. 0.5."),
]
BudgetMsOption = Annotated[
    float | None,
    typer.Option(help="Be most accurate at this mean time per sample; times the parts."),
]
RuleOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="entropy (default), max_probability, margin, learned; by hand also entropy_nats. Of "
        "pixels: pixel_share (default), mean_max_probability, mean_entropy, low_quantile, "
        "agreement.",
    ),
]
PixelThresholdOption = Annotated[
    float | None,
    typer.Option(help="For pixel_share: how sure a pixel must be; chosen too where left out."),
]
PatienceOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Let a sample leave only if N exits in a row agree on it."),
]
TemperaturesOption = Annotated[
    str | None,
    typer.Option(
        metavar="all|survivors",
        help="Fit one for each exit, on all samples or on those that reach it.",
    ),
]
PriorOption = Annotated[
    str | None,
    typer.Option(
        metavar="uniform|FILE",
        help="Weight the samples to these shares of classes (JSON: share by class name).",
    ),
]
AimOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="latency",
        help="With --max-drop: time the parts, and switch off exits that do not pay.",
    ),
]
BatchSizeOption = Annotated[
    int | None, typer.Option(help="Samples a batch, where parts are timed; default 1.")
]
BackendOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="torch or onnxruntime, which is the default, to time."),
]


def calibrate(
    run: RunFolder,
    thresholds: ThresholdsOption = None,
    max_drop: MaxDropOption = None,
    max_risk: MaxRiskOption = None,
    risk: RiskOption = None,
    guarantee: GuaranteeOption = None,
    budget_macs: BudgetMacsOption = None,
    budget_share: BudgetShareOption = None,
    budget_ms: BudgetMsOption = None,
    rule: RuleOption = None,
    pixel_threshold: PixelThresholdOption = None,
    patience: PatienceOption = None,
    temperatures: TemperaturesOption = None,
    prior: PriorOption = None,
    aim: AimOption = None,
    batch_size: BatchSizeOption = None,
    backend: BackendOption = None,
    data: DataOption = None,
    device: DeviceOption = None,
) -> None:
    """Choose when to stop, skip or drop, on data set aside from training; write policy.json."""
    _require_one_target(thresholds, max_drop, max_risk, budget_macs, budget_share, budget_ms)
    wanted = Wanted(
        max_drop=max_drop,
        max_risk=max_risk,
        risk="accuracy_gap" if risk is None else risk,
        budget_macs=budget_macs,
        budget_share=budget_share,
        budget_ms=budget_ms,
        guarantee=_read_guarantee(guarantee),
        rule="entropy" if rule is None else rule,
        pixel_threshold=pixel_threshold,
        patience=patience,
        temperatures=temperatures,
        timing=_read_timing(aim, max_drop, budget_ms, batch_size=batch_size, backend=backend),
    )
    by_hand = thresholds is not None
    _check_combination(wanted, risk_given=risk is not None, by_hand=by_hand)
    if by_hand and prior is not None:
        raise InvalidArgumentError("--prior weights calibration data, which --thresholds need not.")
    if not by_hand:
        wanted.check()
    from offramp.families import family_of
    from offramp.training.run import load

    loaded, where = load(run), {"data": data, "device": device, "prior": prior}
    if rule is None:
        wanted = replace(wanted, rule=default_rule(loaded.network.is_dense))
    if family_of(loaded.network).thresholds is not None:
        refuse_exits(loaded, loaded.network, wanted, rule=rule)
        if thresholds is None:
            choose_routing(loaded, loaded.network, wanted, **where)
        else:
            set_threshold_by_hand(loaded, loaded.network, thresholds)
    elif thresholds is None:
        choose(loaded, wanted, **where)
    else:
        _set_by_hand(loaded, thresholds, wanted)


def _require_one_target(*targets: object) -> None:
    if sum(target is not None for target in targets) != 1:
        raise InvalidArgumentError(
            "Give exactly one of --thresholds, --max-drop, --max-risk, --budget-macs, "
            "--budget-share and --budget-ms."
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


def _read_timing(
    aim: str | None,
    max_drop: float | None,
    budget_ms: float | None,
    *,
    batch_size: int | None,
    backend: str | None,
) -> Timing | None:
    """How to time the parts, where the clock is asked for."""
    if aim not in (None, "latency"):
        raise InvalidArgumentError(f"--for must be latency. Got {aim!r}.")
    if aim is not None and max_drop is None:
        raise InvalidArgumentError(
            "--for latency switches off exits as long as an accuracy target holds: give it with "
            "--max-drop."
        )
    if aim is None and budget_ms is None:
        if batch_size is not None or backend is not None:
            raise InvalidArgumentError(
                "--batch-size and --backend are for timing the parts: give --for latency or "
                "--budget-ms as well."
            )
        return None
    if backend not in (None, "torch", "onnxruntime"):
        raise InvalidArgumentError(f"--backend must be torch or onnxruntime. Got {backend!r}.")
    return Timing(
        batch_size=1 if batch_size is None else batch_size, backend=backend or "onnxruntime"
    )


def _check_combination(wanted: Wanted, *, risk_given: bool, by_hand: bool) -> None:
    """Refuse options that have no meaning together, before anything is computed."""
    if risk_given and wanted.max_risk is None:
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


def _set_by_hand(loaded: Run, thresholds: str, wanted: Wanted) -> None:
    from offramp.training.run import write_policy

    rule, values = wanted.rule, _read_thresholds(thresholds, loaded.network.num_exits)
    asked: dict[str, Any] = {"thresholds": thresholds, "rule": rule}
    policy: ThresholdedPolicy
    if loaded.multi_exit.is_dense:
        policy = dense_policy_by_hand(values, rule, wanted.pixel_threshold)
        asked["pixel_threshold"] = wanted.pixel_threshold
    else:
        refuse_pixel_threshold(wanted.pixel_threshold)
        num_classes = loaded.require_recipe().network_options["num_classes"]
        policy = _policy_by_hand(thresholds, values, rule, num_classes=num_classes)
    about = {"asked": asked, "data": None, "reached": None}
    write_policy(loaded.folder, policy, calibration=about)
    print(f"{words_of(policy)}, set by hand")


def _read_thresholds(text: str, num_exits: int) -> tuple[float, ...]:
    try:
        values = [math.inf if part == "off" else float(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidArgumentError(
            f"Expected numbers separated by commas for --thresholds. Got {text!r}."
        ) from error
    if len(values) != num_exits - 1:
        raise InvalidArgumentError(
            f"Expected {num_exits - 1} thresholds, one per exit but the final one. "
            f"Got {len(values)}: {text!r}."
        )
    return tuple(values)


def _policy_by_hand(
    text: str, values: tuple[float, ...], rule: str, *, num_classes: int
) -> ThresholdPolicy:
    from offramp.policy.confidence import confidence_from_entropy_nats
    from offramp.policy.policies import ThresholdPolicy

    if rule == "entropy_nats":
        words = text.split(",")
        return ThresholdPolicy(
            tuple(
                value if word == "off" else confidence_from_entropy_nats(value, num_classes)
                for word, value in zip(words, values, strict=True)
            )
        )
    return ThresholdPolicy(values, rule=rule)
