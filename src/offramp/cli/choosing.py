"""What ``offramp calibrate`` does once it knows what is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from offramp.cli.calibration_data import Prepared, conclude, prepare, prepare_finding
from offramp.cli.choosing_pixels import refuse_pixel_threshold, with_pixel_threshold
from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from offramp.calibration.logits import ExitLogits
    from offramp.calibration.rules import Rule
    from offramp.calibration.thresholds import Calibration
    from offramp.measure.profile import Profile
    from offramp.policy.policies import ThresholdedPolicy
    from offramp.training.run import Run

LEARNED = "learned"
"""The rule that is no confidence function: scorers are fitted on the calibration data."""

TARGETS = ("max_drop", "max_risk", "budget_macs", "budget_share")
"""What ``calibrate`` of the library aims at, without a clock."""

_LEAST_SURVIVORS = 100
"""Where fewer samples reach an exit, its temperature is the one fitted on all."""

_NUM_FINDING = 4_000
"""Training samples that find the candidates of a promise."""

PROFILE_FILE = "profile.json"
"""Where a run folder keeps the times of its parts."""


def rule_named(name: str) -> Rule:
    """The rule that ``--rule`` names.

    Args:
        name: A confidence function, or ``LEARNED``.
    Returns:
        As the library takes it.
    Raises:
        InvalidArgumentError: If there is none of that name.
    """
    from offramp.calibration.controller import fit_controller
    from offramp.policy.confidence import AGREEMENT, CONFIDENCE_RULES, DENSE_RULES

    if name == LEARNED:
        return fit_controller
    of_samples, of_pixels = (*CONFIDENCE_RULES, LEARNED), (*DENSE_RULES, AGREEMENT)
    if name not in (*of_samples, *of_pixels):
        raise InvalidArgumentError(
            f"The rule must be one of {', '.join(of_samples)}; of {', '.join(of_pixels)} where the "
            f"network says a class for every pixel. Got {name!r}."
        )
    return name


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How the parts of a network are timed.

    Attributes:
        batch_size: Samples a batch.
        backend: torch or onnxruntime.
    """

    batch_size: int
    backend: str


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a policy is asked for; one target is given, the others are None.

    Attributes:
        max_drop: Most accuracy to lose.
        max_risk: Most of another risk.
        risk: Which.
        budget_macs: Mean MACs per sample.
        budget_share: The same as a share of the plain network's.
        budget_ms: Mean milliseconds per sample.
        guarantee: Probability, or "mean"; None without a promise.
        rule: Confidence function, or ``LEARNED``.
        pixel_threshold: How sure a pixel must be to count as sure; None to choose it too.
        patience: Exits in a row that must agree; None for thresholds alone.
        temperatures: all or survivors; None without temperatures.
        timing: For targets that need the clock.
    """

    max_drop: float | None = None
    max_risk: float | None = None
    risk: str = "accuracy_gap"
    budget_macs: float | None = None
    budget_share: float | None = None
    budget_ms: float | None = None
    guarantee: float | str | None = None
    rule: str = "entropy"
    pixel_threshold: float | None = None
    patience: int | None = None
    temperatures: str | None = None
    timing: Timing | None = None

    def check(self) -> None:
        """Refuse values that no data can make good, before any is read.

        Raises:
            InvalidArgumentError: If a number is out of range or a name unknown.
        """
        from offramp.calibration.guarantee import check_guarantee
        from offramp.calibration.risk import check_risk
        from offramp.policy.dense_policies import DensePolicy
        from offramp.policy.policies import PatiencePolicy

        for name, value in (("max_drop", self.max_drop), ("max_risk", self.max_risk)):
            if value is not None:
                check_risk(self.risk, value, name=name)
                if self.guarantee is not None:
                    check_guarantee(value, self.guarantee)
        rule_named(self.rule)
        if self.pixel_threshold is not None:
            DensePolicy((), pixel_threshold=self.pixel_threshold)
        if self.patience is not None:
            PatiencePolicy(self.patience, num_exits=self.patience + 1)

    @property
    def is_fitted(self) -> bool:
        """Whether the policy itself is fitted on samples, which training must not have seen."""
        return self.rule == LEARNED or self.temperatures is not None

    @property
    def risk_limit(self) -> dict[str, Any]:
        """What a guarantee is asked for, as the library takes it."""
        limit = self.max_drop if self.max_risk is None else self.max_risk
        return {"max_risk": limit, "risk": self.risk, "guarantee": self.guarantee}

    @property
    def target(self) -> dict[str, Any]:
        """The target as ``calibrate`` of the library takes it."""
        values = {name: getattr(self, name) for name in TARGETS}
        target = {name: value for name, value in values.items() if value is not None}
        return target | ({"risk": self.risk} if "max_risk" in target else {})

    def to_dict(self) -> dict[str, Any]:
        """What was asked, without what was not."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if self.max_risk is None:
            del given["risk"]
        if self.timing is not None:
            given |= asdict(given.pop("timing"))
            given |= {"for": "latency"} if self.budget_ms is None else {}
        return given

    def make_policies(self, logits: ExitLogits) -> tuple[ThresholdedPolicy, ...]:
        """The policies whose thresholds are to be chosen, fitted on samples where they need them.

        Args:
            logits: Every exit's logits on these samples.
        Returns:
            One, or several of which the best is to be chosen; their own thresholds do not matter.
        Raises:
            InvalidArgumentError: If what is wanted is not for a network with such outputs.
        """
        if not logits.is_dense:
            refuse_pixel_threshold(self.pixel_threshold)
            return (self._make_policy(logits),)
        if self.patience is not None or self.rule == LEARNED:
            raise InvalidArgumentError(
                "--patience and --rule learned are about one class a sample. This network says one "
                "for every pixel: use --rule agreement for exits that agree."
            )
        policies = logits.policies(rule_named(self.rule))
        if self.pixel_threshold is not None:
            policies = (with_pixel_threshold(policies[0], self.pixel_threshold),)
        if self.temperatures is None:
            return policies
        return tuple(self._tempered(logits, policy) for policy in policies)

    def _make_policy(self, logits: ExitLogits) -> ThresholdedPolicy:
        from offramp.policy.policies import PatiencePolicy

        if self.patience is not None:
            if self.patience >= logits.costs.num_exits:
                raise InvalidArgumentError(
                    f"--patience must be below the network's {logits.costs.num_exits} exits, or "
                    f"nobody can leave early. Got {self.patience}."
                )
            return PatiencePolicy(self.patience, logits.costs.num_exits, rule=self.rule)
        policy = logits.policies(rule_named(self.rule))[0]
        return policy if self.temperatures is None else self._tempered(logits, policy)

    def _tempered(self, logits: ExitLogits, policy: ThresholdedPolicy) -> ThresholdedPolicy:
        from offramp.policy.dense_policies import DensePolicy
        from offramp.policy.policies import ThresholdPolicy

        if not isinstance(policy, ThresholdPolicy | DensePolicy):
            raise InvalidArgumentError(
                f"--temperatures do not change what --rule {self.rule} goes by: leave them out."
            )
        return replace(policy, temperatures=self._fit_temperatures(logits, policy))

    def _fit_temperatures(self, logits: ExitLogits, policy: ThresholdedPolicy) -> tuple[float, ...]:
        from offramp.calibration.evidence import choose_policy
        from offramp.calibration.temperature import fit_temperatures
        from offramp.calibration.thresholds import reached_under

        of_all = fit_temperatures(logits)
        if self.temperatures == "all":
            return of_all
        # Who survives depends on the thresholds, and those on the temperatures: one round of both.
        tempered = replace(policy, temperatures=of_all)  # type: ignore[type-var]
        chosen = choose_policy(logits, rule=tempered, **self.target).policy
        reached_KN = reached_under(logits, chosen)
        of_survivors = fit_temperatures(logits, reached_KN=reached_KN)
        return tuple(
            own if count >= _LEAST_SURVIVORS else common
            for own, common, count in zip(of_survivors, of_all, reached_KN.sum(1), strict=True)
        )


def choose(
    loaded: Run, wanted: Wanted, *, data: str | None, device: str | None, prior: str | None
) -> None:
    """Choose a policy, say what it promises and reaches, and write it into the run.

    Args:
        loaded: The run.
        wanted: What is asked.
        data: Where the run's data is.
        device: Where to compute.
        prior: As for :func:`~offramp.cli.calibration_data.prepare`.
    """
    from offramp.calibration.collect import collect
    from offramp.calibration.evidence import choose_policy
    from offramp.calibration.guarantee import calibrate_with_guarantee
    from offramp.training.run import CALIBRATION_SPLIT

    run_exits = partial(collect, loaded.network)
    prepared = prepare(loaded, run_exits, data=data, device=device, prior=prior)
    logits = prepared.logits_for(wanted.guarantee)
    found_on = "train"
    if wanted.timing is not None:
        chosen = _choose_by_the_clock(prepared, wanted, wanted.timing)
    elif wanted.guarantee is not None:
        if wanted.is_fitted:
            finding, found_on = None, CALIBRATION_SPLIT
        else:
            finding = prepare_finding(prepared, run_exits, num_samples=_NUM_FINDING, data=data)
        chosen = calibrate_with_guarantee(
            logits, rule=wanted.make_policies, finding=finding, **wanted.risk_limit
        )
    else:
        chosen = choose_policy(logits, rule=wanted.make_policies, **wanted.target)
    _print_policy(prepared, chosen.policy)
    promise = None
    if chosen.guarantee is not None:
        sentence = chosen.guarantee.sentence(prepared.population)
        promise = asdict(chosen.guarantee) | {"sentence": sentence, "found_on": found_on}
    conclude(
        prepared,
        chosen.policy,
        asked=wanted.to_dict(),
        reached={
            "accuracy": chosen.accuracy,
            "mean_macs": chosen.mean_macs,
            **({} if chosen.mean_iou is None else {"mean_iou": chosen.mean_iou}),
        },
        promise=promise,
        plain_macs=logits.costs.plain_macs,
    )


def words_of(policy: ThresholdedPolicy) -> str:
    """A policy's thresholds and rule, to be printed.

    Args:
        policy: The policy.
    Returns:
        Words without a full stop.
    """
    from offramp.policy.as_dict import policy_to_dict
    from offramp.runtime.answers import rule_in_words

    shown = ", ".join("off" if t == math.inf else f"{t:.4f}" for t in policy.thresholds)
    return f"thresholds {shown} (rule {rule_in_words(policy_to_dict(policy))})"


def _print_policy(prepared: Prepared[ExitLogits], policy: ThresholdedPolicy) -> None:
    print(f"{words_of(policy)}, chosen on {len(prepared.batches):,} calibration samples")
    if temperatures := getattr(policy, "temperatures", None):
        _print_temperatures(prepared.logits, policy, temperatures)


def _print_temperatures(
    logits: ExitLogits, policy: ThresholdedPolicy, temperatures: Sequence[float]
) -> None:
    """What they do, on those who reach each exit."""
    from rich.console import Console
    from rich.table import Table

    from offramp.calibration.temperature import describe_temperatures
    from offramp.calibration.thresholds import reached_under

    reached_KN = reached_under(logits, policy)
    table = Table(title="temperatures, in sample, on those who reach the exit")
    for column in ("exit", "samples", "temperature", "ECE", "with it", "Brier", "with it", "AUROC"):
        table.add_column(column, justify="right")
    for row in describe_temperatures(logits, temperatures, reached_KN=reached_KN):
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


def _choose_by_the_clock(
    prepared: Prepared[ExitLogits], wanted: Wanted, timing: Timing
) -> Calibration:
    """Time the parts, keep the times in profile.json, and choose by them."""
    from offramp.artifacts import write_json
    from offramp.calibration.latency import calibrate_for_latency, calibrate_to_milliseconds
    from offramp.calibration.risk import check_risk

    if wanted.max_drop is not None:
        check_risk(
            "accuracy_gap", wanted.max_drop, name="max_drop"
        )  # refused before the parts are timed
    policies = wanted.make_policies(prepared.logits)
    profile = _time_parts(prepared, policies[0], timing)
    how: dict[str, Any] = {"batch_size": timing.batch_size, "rule": lambda _: policies}
    if wanted.budget_ms is not None:
        found = calibrate_to_milliseconds(
            prepared.logits, profile, budget_ms=wanted.budget_ms, **how
        )
    else:
        assert wanted.max_drop is not None  # the command asked for one of the two
        found = calibrate_for_latency(prepared.logits, profile, max_drop=wanted.max_drop, **how)
    write_json(prepared.run.folder / PROFILE_FILE, profile.to_dict())
    for gone in found.switched_off:
        print(
            f"exit {gone.exit_index} off: a batch of {timing.batch_size} takes "
            f"{gone.ms_without:.3f} ms without it, {gone.ms_with:.3f} with it; asking there takes "
            f"{gone.asking_ms:.3f}"
        )
    if wanted.budget_ms is None and not found.switched_off:
        policy = found.chosen.policy
        has_exits = len(policy.off_exits) < policy.num_exits - 1
        print("every exit that is on pays" if has_exits else "the target leaves no exit on")
    print(
        f"expected {found.batch_ms:.3f} ms a batch of {timing.batch_size}, plain network "
        f"{found.plain_ms:.3f} ({profile.hardware}, {profile.threads} threads)"
    )
    return found.chosen


def _time_parts(
    prepared: Prepared[ExitLogits], policy: ThresholdedPolicy, timing: Timing
) -> Profile:
    from offramp.exporting.profiling import profile_exported
    from offramp.inference.profiling import profile_network
    from offramp.inference.timing import check_batch_sizes

    network, batch_size = prepared.run.multi_exit, timing.batch_size
    check_batch_sizes([batch_size], num_samples=len(prepared.batches))
    inputs, _ = prepared.batches.__getitems__(list(range(batch_size)))
    print(f"timing stages, exits and compaction in {timing.backend}")
    asks = policy.with_thresholds((math.inf,) * (policy.num_exits - 1))
    if timing.backend == "torch":
        on_device = inputs.to(prepared.device)
        return profile_network(network, asks, on_device, batch_size=batch_size)
    return profile_exported(network.cpu(), asks, inputs, batch_size=batch_size)
