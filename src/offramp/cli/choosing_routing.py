"""What ``offramp calibrate`` does for a run that one threshold steers: of gates, or of tokens."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from offramp.cli.calibration_data import conclude, prepare, prepare_finding
from offramp.cli.choosing import Wanted
from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from offramp.families.family import Words
    from offramp.training.run import Run
    from offramp.zoo import Network


_NUM_FINDING = 1_000
"""Training samples that size the bets of a promise."""


def words_for(network: Network) -> Words:
    """The words for the family of a network."""
    from offramp.families import family_of

    return family_of(network).words


def refuse_exits(loaded: Run, network: Network, wanted: Wanted, *, rule: str | None) -> None:
    """Refuse options that are about exits.

    Args:
        loaded: A run that one threshold steers.
        network: Its network.
        wanted: What is asked.
        rule: What ``--rule`` was given.
    Raises:
        InvalidArgumentError: If there is one; the first is named.
    """
    words = words_for(network)
    given = {
        "--rule": rule,
        "--patience": wanted.patience,
        "--pixel-threshold": wanted.pixel_threshold,
        "--temperatures": wanted.temperatures,
        "--budget-ms": wanted.budget_ms,
        "--for latency": wanted.timing,
    }
    for name, value in given.items():
        if value is not None:
            raise InvalidArgumentError(
                f"{name} is about exits. The run {loaded.folder} {words.does} inside, and its "
                f"{words.share} share one threshold: leave {name} out."
            )


def set_threshold_by_hand(loaded: Run, network: Network, threshold: str) -> None:
    """Write a threshold of the gates or tokens into the run.

    Args:
        loaded: A run that one threshold steers.
        network: Its network.
        threshold: What ``--thresholds`` was given.
    Raises:
        InvalidArgumentError: If it is not one number in [0, 1].
    """
    from offramp.families import family_of
    from offramp.training.run import write_policy

    words = words_for(network)
    try:
        policy = family_of(network).policy(float(threshold))
    except ValueError as error:
        raise InvalidArgumentError(
            f"Expected one number in [0, 1] for --thresholds: the {words.share} of "
            f"{loaded.folder} share it. Got {threshold!r}."
        ) from error
    about = {"asked": {"thresholds": threshold}, "data": None, "reached": None}
    write_policy(loaded.folder, policy, calibration=about)
    print(f"threshold of the {words.share} set by hand: {policy.threshold}")


def choose_routing(
    loaded: Run,
    network: Network,
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
    from offramp.calibration.sweep import best_threshold, choose_threshold_with_guarantee
    from offramp.families import family_of
    from offramp.inference.sweeping import collect_sweep

    words = words_for(network)
    run_thresholds = partial(collect_sweep, network)
    prepared = prepare(loaded, run_thresholds, data=data, device=device, prior=prior)
    sweep = prepared.logits_for(wanted.guarantee)
    if wanted.guarantee is None:
        chosen = best_threshold(sweep, **wanted.target)
    else:
        finding = prepare_finding(prepared, run_thresholds, num_samples=_NUM_FINDING, data=data)
        chosen = choose_threshold_with_guarantee(sweep, finding=finding, **wanted.risk_limit)
    promise = None
    if chosen.guarantee is not None:
        sentence = chosen.guarantee.sentence(
            prepared.population, way=words.way, last=words.whole_network
        )
        promise = asdict(chosen.guarantee) | {"sentence": sentence, "found_on": "train"}
    print(
        f"threshold {chosen.threshold:.4f} of the {words.share}, chosen on "
        f"{len(prepared.batches):,} calibration samples"
    )
    asked = wanted.to_dict()
    del asked["rule"]  # of exits
    conclude(
        prepared,
        family_of(network).policy(chosen.threshold),
        asked=asked,
        reached={"accuracy": chosen.accuracy, "mean_macs": chosen.mean_macs},
        promise=promise,
        plain_macs=sweep.plain_macs,
    )
