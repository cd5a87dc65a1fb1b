"""``offramp calibrate``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import DataOption, DeviceOption, RunFolder, percent, pick_device
from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from offramp.calibration.thresholds import Calibration
    from offramp.policy.policies import ThresholdPolicy


def calibrate(
    run: RunFolder,
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="T0,T1,...", help="By hand: a number or off, for each exit but the last."
        ),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Spend least; lose at most this fraction of accuracy.")
    ] = None,
    budget_macs: Annotated[
        float | None, typer.Option(help="Be most accurate at this many mean MACs per sample.")
    ] = None,
    rule: Annotated[
        str, typer.Option(help="entropy, max_probability, margin; entropy_nats with --thresholds.")
    ] = "entropy",
    data: DataOption = None,
    device: DeviceOption = None,
) -> None:
    """Choose when to stop, on data set aside from training, and write policy.json."""
    if sum(target is not None for target in (thresholds, max_drop, budget_macs)) != 1:
        raise InvalidArgumentError(
            "Give exactly one of --thresholds, --max-drop and --budget-macs."
        )
    from offramp.training.run import load, write_policy

    loaded = load(run)
    if thresholds is not None:
        num_classes = loaded.require_recipe().network_options["num_classes"]
        policy = _policy_by_hand(
            thresholds, rule, num_exits=loaded.network.num_exits, num_classes=num_classes
        )
        asked: dict[str, Any] = {"thresholds": thresholds, "rule": rule}
        write_policy(run, policy, calibration={"asked": asked, "data": None, "reached": None})
        print(f"thresholds set by hand: {policy.thresholds}, rule {policy.rule}")
        return

    from offramp.calibration.collect import collect
    from offramp.calibration.thresholds import calibrate as choose
    from offramp.training.data import make_loader
    from offramp.training.run import CALIBRATION_SPLIT, load_batches

    recipe = loaded.require_recipe()
    batches, _, fingerprint = load_batches(recipe, CALIBRATION_SPLIT, data or loaded.data)
    network = loaded.network.to(pick_device(device))
    logits = collect(network, make_loader(batches, batch_size=256))
    chosen = choose(logits, max_drop=max_drop, budget_macs=budget_macs, rule=rule)
    reached = {"accuracy": chosen.accuracy, "mean_macs": chosen.mean_macs}
    used = {
        "name": recipe.data,
        "split": CALIBRATION_SPLIT,
        "num_samples": len(batches),
        "class_prior": "uniform" if recipe.uniform_prior else "as in train",
        "sha256": fingerprint,
    }
    target = {"max_drop": max_drop, "budget_macs": budget_macs, "rule": rule}
    about = {"asked": target, "data": used, "reached": reached}
    write_policy(run, chosen.policy, calibration=about)
    _print_choice(chosen, num_samples=len(batches), plain_macs=logits.costs.plain_macs)


def _print_choice(chosen: Calibration, *, num_samples: int, plain_macs: int) -> None:
    policy = chosen.policy
    shown = ", ".join("off" if t == math.inf else f"{t:.4f}" for t in policy.thresholds)
    print(f"thresholds {shown} (rule {policy.rule}), chosen on {num_samples:,} calibration samples")
    print(
        f"there: accuracy {percent(chosen.accuracy)} at {chosen.mean_macs:,.0f} mean MACs, "
        f"{percent(chosen.mean_macs / plain_macs)} of the plain network's"
    )


def _policy_by_hand(text: str, rule: str, *, num_exits: int, num_classes: int) -> ThresholdPolicy:
    from offramp.policy.confidence import confidence_from_entropy_nats
    from offramp.policy.policies import ThresholdPolicy

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
    if rule == "entropy_nats":
        words = text.split(",")
        return ThresholdPolicy(
            tuple(
                value if word == "off" else confidence_from_entropy_nats(value, num_classes)
                for word, value in zip(words, values, strict=True)
            )
        )
    return ThresholdPolicy(tuple(values), rule=rule)
