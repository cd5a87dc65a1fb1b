"""What ``offramp calibrate`` does for a run that skips blocks: its gates share one threshold."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from offramp.cli.calibration_data import conclude, prepare
from offramp.cli.choosing import Wanted
from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from offramp.routing.skip import SkipNetwork
    from offramp.training.run import Run


def refuse_exits(loaded: Run, wanted: Wanted, *, rule: str | None) -> None:
    """Refuse options that are about exits.

    Args:
        loaded: A run that skips blocks.
        wanted: What is asked.
        rule: What ``--rule`` was given.
    Raises:
        InvalidArgumentError: If there is one; the first is named.
    """
    given = {
        "--rule": rule,
        "--patience": wanted.patience,
        "--temperatures": wanted.temperatures,
        "--budget-ms": wanted.budget_ms,
        "--for latency": wanted.timing,
    }
    for name, value in given.items():
        if value is not None:
            raise InvalidArgumentError(
                f"{name} is about exits. The run {loaded.folder} skips blocks inside, and its "
                f"gates share one threshold: leave {name} out."
            )


def set_gates_by_hand(loaded: Run, threshold: str) -> None:
    """Write a threshold of the gates into the run.

    Args:
        loaded: A run that skips blocks.
        threshold: What ``--thresholds`` was given.
    Raises:
        InvalidArgumentError: If it is not one number in [0, 1].
    """
    from offramp.policy.gate_policy import GatePolicy
    from offramp.training.run import write_policy

    try:
        policy = GatePolicy(float(threshold))
    except ValueError as error:
        raise InvalidArgumentError(
            f"Expected one number in [0, 1] for --thresholds: the gates of {loaded.folder} share "
            f"it. Got {threshold!r}."
        ) from error
    about = {"asked": {"thresholds": threshold}, "data": None, "reached": None}
    write_policy(loaded.folder, policy, calibration=about)
    print(f"threshold of the gates set by hand: {policy.threshold}")


def choose_gates(
    loaded: Run,
    network: SkipNetwork,
    wanted: Wanted,
    *,
    data: str | None,
    device: str | None,
    prior: str | None,
) -> None:
    """Choose a threshold, say what it promises and reaches, and write it into the run.

    Args:
        loaded: The run.
        network: Its network.
        wanted: What is asked.
        data: Where the run's data is.
        device: Where to compute.
        prior: As for :func:`~offramp.cli.calibration_data.prepare`.
    """
    from offramp.calibration.sweep import choose_threshold, choose_threshold_with_guarantee
    from offramp.inference.sweeping import collect_sweep
    from offramp.policy.gate_policy import GatePolicy

    prepared = prepare(
        loaded, partial(collect_sweep, network), data=data, device=device, prior=prior
    )
    sweep = prepared.logits_for(wanted.guarantee)
    if wanted.guarantee is None:
        chosen = choose_threshold(sweep, **wanted.target)
    else:
        chosen = choose_threshold_with_guarantee(sweep, **wanted.risk_limit)
    promise = None
    if chosen.guarantee is not None:
        sentence = chosen.guarantee.sentence(
            prepared.population, way="skipping", last="the whole network"
        )
        promise = asdict(chosen.guarantee) | {"sentence": sentence}
    print(
        f"threshold {chosen.threshold:.4f} of the gates, chosen on {len(prepared.batches):,} "
        "calibration samples"
    )
    asked = wanted.to_dict()
    del asked["rule"]  # of exits
    conclude(
        prepared,
        GatePolicy(chosen.threshold),
        asked=asked,
        reached={"accuracy": chosen.accuracy, "mean_macs": chosen.mean_macs},
        promise=promise,
        plain_macs=sweep.plain_macs,
    )
