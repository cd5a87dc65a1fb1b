"""``offramp calibrate``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.options import DataOption, DeviceOption, RunFolder, percent, pick_device
from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from offramp.calibration.collect import ExitLogits
    from offramp.calibration.thresholds import Calibration
    from offramp.policy.policies import ThresholdPolicy
    from offramp.training.data import ImageBatches
    from offramp.training.run import Run

PROFILE_FILE = "profile.json"
"""Where a run folder keeps the times of its parts."""


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
    aim: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="latency",
            help="With --max-drop: time the parts, and switch off exits that do not pay.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples a batch, for --for latency; default 1.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="torch or onnxruntime, for --for latency; the default."),
    ] = None,
    data: DataOption = None,
    device: DeviceOption = None,
) -> None:
    """Choose when to stop, on data set aside from training, and write policy.json."""
    _require_one_target(thresholds, max_drop, budget_macs)
    _check_aim(aim, max_drop, batch_size=batch_size, backend=backend)
    from offramp.training.run import load

    loaded = load(run)
    if thresholds is not None:
        _set_by_hand(loaded, thresholds, rule)
        return
    target = {"max_drop": max_drop, "budget_macs": budget_macs, "rule": rule}
    prepared = _prepare(loaded, data, device)
    if aim is not None:
        assert max_drop is not None  # checked above
        how: dict[str, Any] = {
            "batch_size": 1 if batch_size is None else batch_size,
            "backend": backend or "onnxruntime",
        }
        chosen = _choose_for_latency(prepared, max_drop=max_drop, rule=rule, **how)
        target |= {"for": aim, **how}
    else:
        from offramp.calibration.thresholds import calibrate as choose

        chosen = choose(prepared.logits, max_drop=max_drop, budget_macs=budget_macs, rule=rule)
    prepared.write(chosen, target)


def _require_one_target(*targets: object) -> None:
    if sum(target is not None for target in targets) != 1:
        raise InvalidArgumentError(
            "Give exactly one of --thresholds, --max-drop and --budget-macs."
        )


def _check_aim(
    aim: str | None, max_drop: float | None, *, batch_size: int | None, backend: str | None
) -> None:
    if aim is None:
        if batch_size is not None or backend is not None:
            raise InvalidArgumentError(
                "--batch-size and --backend are for timing the parts: give --for latency as well."
            )
        return
    if aim != "latency":
        raise InvalidArgumentError(f"--for must be latency. Got {aim!r}.")
    if max_drop is None:
        raise InvalidArgumentError(
            "--for latency switches off exits as long as an accuracy target holds: give it with "
            "--max-drop."
        )
    if backend not in (None, "torch", "onnxruntime"):
        raise InvalidArgumentError(f"--backend must be torch or onnxruntime. Got {backend!r}.")


def _set_by_hand(loaded: Run, thresholds: str, rule: str) -> None:
    from offramp.training.run import write_policy

    num_classes = loaded.require_recipe().network_options["num_classes"]
    policy = _policy_by_hand(
        thresholds, rule, num_exits=loaded.network.num_exits, num_classes=num_classes
    )
    asked = {"thresholds": thresholds, "rule": rule}
    about = {"asked": asked, "data": None, "reached": None}
    write_policy(loaded.folder, policy, calibration=about)
    print(f"thresholds set by hand: {policy.thresholds}, rule {policy.rule}")


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A run with what its exits say of the samples set aside."""

    run: Run
    device: str
    batches: ImageBatches
    fingerprint: str
    logits: ExitLogits

    def write(self, chosen: Calibration, target: dict[str, Any]) -> None:
        """Write the policy with what was asked, of which data, and what was reached; print it."""
        from offramp.training.run import CALIBRATION_SPLIT, write_policy

        recipe, num_samples = self.run.require_recipe(), len(self.batches)
        used = {
            "name": recipe.data,
            "split": CALIBRATION_SPLIT,
            "num_samples": num_samples,
            "class_prior": "uniform" if recipe.uniform_prior else "as in train",
            "sha256": self.fingerprint,
        }
        reached = {"accuracy": chosen.accuracy, "mean_macs": chosen.mean_macs}
        about = {"asked": target, "data": used, "reached": reached}
        write_policy(self.run.folder, chosen.policy, calibration=about)
        plain_macs = self.logits.costs.plain_macs
        _print_choice(chosen, num_samples=num_samples, plain_macs=plain_macs)


def _prepare(loaded: Run, data: str | None, device: str | None) -> _Prepared:
    from offramp.calibration.collect import collect
    from offramp.training.data import make_loader
    from offramp.training.run import CALIBRATION_SPLIT, load_batches

    where = pick_device(device)
    recipe = loaded.require_recipe()
    batches, _, fingerprint = load_batches(recipe, CALIBRATION_SPLIT, data or loaded.data)
    loader = make_loader(batches, batch_size=256)
    logits = collect(loaded.network.to(where), loader)
    return _Prepared(
        run=loaded, device=where, batches=batches, fingerprint=fingerprint, logits=logits
    )


def _choose_for_latency(
    prepared: _Prepared, *, max_drop: float, rule: str, batch_size: int, backend: str
) -> Calibration:
    """Time the parts, keep the times in profile.json, and say what was switched off and why."""
    from offramp.artifacts import write_json
    from offramp.calibration.latency import calibrate_for_latency
    from offramp.calibration.thresholds import check_max_drop
    from offramp.exporting.profiling import profile_exported
    from offramp.inference.profiling import profile_network
    from offramp.inference.timing import check_batch_sizes
    from offramp.policy.policies import never_leave

    network, samples = prepared.run.network, prepared.batches
    # What cannot be asked or timed is refused before the parts are.
    check_max_drop(max_drop)
    check_batch_sizes([batch_size], num_samples=len(samples))
    inputs, _ = samples.__getitems__(list(range(batch_size)))
    asks = replace(never_leave(network.num_exits), rule=rule)
    print(f"timing stages, exits and compaction in {backend}")
    if backend == "torch":
        on_device = inputs.to(prepared.device)
        profile = profile_network(network, asks, on_device, batch_size=batch_size)
    else:
        profile = profile_exported(network.cpu(), asks, inputs, batch_size=batch_size)
    found = calibrate_for_latency(
        prepared.logits, profile, batch_size=batch_size, max_drop=max_drop, rule=rule
    )
    write_json(prepared.run.folder / PROFILE_FILE, profile.to_dict())
    for gone in found.switched_off:
        print(
            f"exit {gone.exit_index} off: a batch of {batch_size} takes {gone.ms_without:.3f} ms "
            f"without it, {gone.ms_with:.3f} with it; asking there takes {gone.asking_ms:.3f}"
        )
    if not found.switched_off:
        has_exits = len(found.chosen.policy.off_exits) < network.num_exits - 1
        print("every exit that is on pays" if has_exits else "the target leaves no exit on")
    print(
        f"expected {found.batch_ms:.3f} ms a batch of {batch_size}, plain network "
        f"{found.plain_ms:.3f} ({profile.hardware}, {profile.threads} threads)"
    )
    return found.chosen


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
