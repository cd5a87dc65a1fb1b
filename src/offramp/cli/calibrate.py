"""``offramp calibrate``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import DataOption, DeviceOption, RunFolder
from offramp.errors import InvalidArgumentError
from offramp.tables import percent
from offramp.workflow.wanted import LEARNED, Timing, Wanted

if TYPE_CHECKING:
    from offramp.families.family import Family
    from offramp.policy.policies import ThresholdedPolicy
    from offramp.workflow.calibrate import Chosen


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
        rule=rule,
        pixel_threshold=pixel_threshold,
        patience=patience,
        temperatures=temperatures,
        timing=_read_timing(aim, max_drop, budget_ms, batch_size=batch_size, backend=backend),
    )
    by_hand = thresholds is not None
    _check_combination(wanted, risk_given=risk is not None, by_hand=by_hand)
    if by_hand and prior is not None:
        raise InvalidArgumentError("--prior weights calibration data, which --thresholds need not.")
    from offramp.families import family_of
    from offramp.runs.run import load
    from offramp.workflow import calibrate as workflow

    if thresholds is not None:
        loaded = load(run)
        family = family_of(loaded.network)
        policy: Any = workflow.set_by_hand(loaded, thresholds, wanted)
        print(
            f"{_words_of(policy)}, set by hand"
            if family.thresholds is None
            else f"threshold of the {family.words.share} set by hand: {policy.threshold}"
        )
        return
    workflow.check_wanted(wanted)
    loaded = load(run)
    family = family_of(loaded.network)
    if wanted.timing is not None and family.thresholds is None:
        print(f"timing stages, exits and compaction in {wanted.timing.backend}")
    chosen = workflow.calibrate(loaded, wanted, data=data, device=device, prior=prior)
    if wanted.timing is not None:
        _print_times(chosen, wanted.timing, switches_off=budget_ms is None)
    _print_chosen(chosen, family)


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


def _print_times(chosen: Chosen, timing: Timing, *, switches_off: bool) -> None:
    """Say what was predicted, and which exits do not pay."""
    found, profile = chosen.timed, chosen.profile
    assert found is not None
    assert profile is not None
    for gone in found.switched_off:
        print(
            f"exit {gone.exit_index} off: a batch of {timing.batch_size} takes "
            f"{gone.ms_without:.3f} ms without it, {gone.ms_with:.3f} with it; asking there takes "
            f"{gone.asking_ms:.3f}"
        )
    if switches_off and not found.switched_off:
        policy = found.chosen.policy
        has_exits = len(policy.off_exits) < policy.num_exits - 1
        print("every exit that is on pays" if has_exits else "the target leaves no exit on")
    print(
        f"expected {found.batch_ms:.3f} ms a batch of {timing.batch_size}, plain network "
        f"{found.plain_ms:.3f} ({profile.hardware}, {profile.threads} threads)"
    )


def _print_chosen(chosen: Chosen, family: Family[Any, Any]) -> None:
    """Print a policy, what it reached and what is promised of it."""
    policy, reached, promise = (
        chosen.calibration.policy,
        chosen.about["reached"],
        chosen.about["guarantee"],
    )
    what = (
        _words_of(policy)
        if family.thresholds is None
        else f"threshold {policy.threshold:.4f} of the {family.words.share}"
    )
    print(f"{what}, chosen on {chosen.num_samples:,} calibration samples")
    _print_temperatures(chosen)
    quality = f"accuracy {percent(reached['accuracy'])}"
    if "mean_iou" in reached:
        quality = f"mean IoU {percent(reached['mean_iou'])}"
    plain_macs = chosen.calibration.plain_macs
    assert plain_macs is not None
    print(
        f"there: {quality} at {reached['mean_macs']:,.0f} mean MACs, "
        f"{percent(reached['mean_macs'] / plain_macs)} of the plain network's"
    )
    if chosen.doubt is not None:
        how = "or add --guarantee 0.95, which says how many a promise takes"
        print(f"warning: {chosen.doubt}, {how}")
    if promise is not None:
        how = f"{promise['method']} on {promise['num_tested']:,} of the samples"
        if promise["num_finding"]:
            how += f"; prepared on {promise['num_finding']:,} {promise['found_on']} samples"
        print(f"{promise['num_passed']} of {promise['num_candidates']} candidates passed ({how})")
        print(promise["sentence"])


def _words_of(policy: ThresholdedPolicy) -> str:
    from offramp.policy.as_dict import policy_to_dict
    from offramp.runtime.answers import rule_in_words

    shown = ", ".join("off" if t == math.inf else f"{t:.4f}" for t in policy.thresholds)
    return f"thresholds {shown} (rule {rule_in_words(policy_to_dict(policy))})"


def _print_temperatures(chosen: Chosen) -> None:
    """What they do, on those who reach each exit."""
    from rich.console import Console
    from rich.table import Table

    if chosen.temperatures is None:
        return
    table = Table(title="temperatures, in sample, on those who reach the exit")
    for column in ("exit", "samples", "temperature", "ECE", "with it", "Brier", "with it", "AUROC"):
        table.add_column(column, justify="right")
    for row in chosen.temperatures:
        figures = (
            row.temperature,
            row.ece_before,
            row.ece_after,
            row.brier_before,
            row.brier_after,
            row.auroc,
        )
        shown = ("-" if figure is None else f"{figure:.3f}" for figure in figures)
        table.add_row(str(row.index), f"{row.num_samples:,}", *shown)
    Console().print(table)
