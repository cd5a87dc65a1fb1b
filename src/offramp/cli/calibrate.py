"""``offramp calibrate``."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from offramp.cli.calibrate_options import Calibrate
from offramp.errors import InvalidArgumentError
from offramp.policy.as_dict import policy_to_dict
from offramp.policy.policies import ThresholdedPolicy
from offramp.runtime.answers import rule_in_words
from offramp.runtime.bundle import is_bundle
from offramp.tables import percent
from offramp.workflow.artifact import refuse_network
from offramp.workflow.calibrate_bundle import calibrate_bundle, set_bundle_by_hand
from offramp.workflow.chosen import Chosen, check_wanted
from offramp.workflow.wanted import Timing, Wanted


def calibrate(asked: Calibrate) -> None:
    """Choose a policy and print it."""
    wanted = asked.wanted
    if is_bundle(asked.run):
        refuse_network(asked.run, asked.network)
        _calibrate_bundle(asked, wanted)
        return
    for name, value in (("--split", asked.split), ("--subset", asked.subset)):
        if value is not None:
            raise InvalidArgumentError(
                f"{name} is for a bundle. The run {asked.run} has set its own samples aside: leave "
                "it out."
            )
    from offramp.families import family_of  # torch, which bundles do not need
    from offramp.runs.own_network import load_run
    from offramp.workflow import calibrate as workflow

    if asked.thresholds is not None:
        loaded = load_run(asked.run, asked.network)
        family = family_of(loaded.network)
        policy: Any = workflow.set_by_hand(loaded, asked.thresholds, wanted)
        print(
            f"{_words_of(policy)}, set by hand"
            if family.thresholds is None
            else f"threshold of the {family.words.share} set by hand: {policy.threshold}"
        )
        return
    check_wanted(wanted)
    loaded = load_run(asked.run, asked.network)
    family = family_of(loaded.network)
    if wanted.timing is not None and family.thresholds is None:
        print(f"timing stages, exits and compaction in {wanted.timing.backend}")
    chosen = workflow.calibrate(
        loaded, wanted, data=asked.data, device=asked.device, prior=asked.prior
    )
    if wanted.timing is not None:
        _print_times(chosen, wanted.timing, switches_off=wanted.budget_ms is None)
    _print_chosen(chosen, family.words.share)


def _calibrate_bundle(asked: Calibrate, wanted: Wanted) -> None:
    """Choose thresholds and write them into a bundle."""
    if asked.thresholds is not None:
        bundle = set_bundle_by_hand(asked.run, asked.thresholds, wanted)
        print(f"thresholds {asked.thresholds} set by hand in {bundle.folder}")
        return
    check_wanted(wanted)
    chosen = calibrate_bundle(
        asked.run,
        wanted,
        data=asked.data,
        split=asked.split,
        subset=asked.subset,
        prior=asked.prior,
    )
    _print_chosen(chosen, getattr(chosen.calibration.policy, "shared_by", ""))
    print(f"written into {asked.run}")


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


def _print_chosen(chosen: Chosen, share: str) -> None:
    """Print a policy, what it reached and what is promised; ``share`` has one threshold."""
    policy, reached, promise = (
        chosen.calibration.policy,
        chosen.about["reached"],
        chosen.about["guarantee"],
    )
    what = f"threshold {policy.threshold:.4f} of the {share}" if share else _words_of(policy)
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
    shown = ", ".join("off" if t == math.inf else f"{t:.4f}" for t in policy.thresholds)
    return f"thresholds {shown} (rule {rule_in_words(policy_to_dict(policy))})"


def _print_temperatures(chosen: Chosen) -> None:
    """Show the effect on the samples that reach each exit."""
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
