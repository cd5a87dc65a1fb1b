"""The samples that a run set aside, and what its network says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from offramp.cli.options import pick_device
from offramp.decoding import parse_json
from offramp.errors import DataError, InvalidArgumentError
from offramp.tables import percent

if TYPE_CHECKING:
    from torch import Tensor

    from offramp.calibration.labelled import LabelledLogits
    from offramp.cli.artifact import Loader
    from offramp.policy.policies import Policy
    from offramp.policy.routing_policy import RoutingPolicy
    from offramp.training.data import Batches
    from offramp.training.run import Run

Logits = TypeVar("Logits", bound="LabelledLogits")
"""ExitLogits, or a Sweep where blocks are skipped or tokens halt."""


@dataclass(frozen=True, kw_only=True)
class Prepared(Generic[Logits]):
    """A run with what its network says of the samples set aside.

    Attributes:
        run: The run.
        device: Where its network is.
        batches: The samples.
        logits: What every exit says of them, or the network at every threshold.
        data: What the policy file says of them.
    """

    run: Run
    device: str
    batches: Batches
    logits: Logits
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def population(self) -> str:
        """What the samples stand for, in words."""
        prior = self.data["class_prior"]
        words = f"{self.data['name']}, classes {'as given' if isinstance(prior, dict) else prior}"
        if not self.data["weighted"]:
            return words
        effective = self.data["effective_num_samples"]
        return f"{words} by weights, effective number {effective:,.0f}"

    def logits_for(self, guarantee: float | str | None) -> Logits:
        """What is chosen on, its prior left out where a promise on average can do without.

        Args:
            guarantee: What is asked for: a probability, "mean", or None.
        Returns:
            The logits.
        """
        if guarantee == "mean" and not self.data["weighted"]:
            # Drawn class by class, which conformal risk control does not know: approximately, then.
            return replace(self.logits, prior=None)
        return self.logits


def prepare(
    loaded: Run,
    collect: Callable[[Loader], Logits],
    *,
    data: str | None,
    device: str | None,
    prior: str | None,
) -> Prepared[Logits]:
    """Run the network on the samples set aside.

    Args:
        loaded: The run.
        collect: From a loader to what its network says, where its parameters are.
        data: Where its data is.
        device: Where to compute.
        prior: uniform, a JSON file with the share of each class, or None: as they were drawn.
    Returns:
        What choosing needs.
    Raises:
        InvalidArgumentError: If the prior is neither, or no shares of these classes.
        DataError: If a class of the prior has no sample.
    """
    from offramp.training.data import make_loader
    from offramp.training.run import CALIBRATION_SPLIT, load_batches

    where = pick_device(device)
    recipe = loaded.require_recipe()
    batches, names, fingerprint = load_batches(recipe, CALIBRATION_SPLIT, data or loaded.data)
    shares = None if prior is None else _read_prior(prior, names)
    loaded.network.to(where)
    logits = collect(make_loader(batches, batch_size=batches.run_batch_size))
    if not logits.is_dense:
        # So many of each class were drawn: a promise is about a population of these shares.
        drawn = tuple((logits.class_counts / len(batches)).tolist())
        logits = replace(logits, prior=shares or drawn)
    elif shares is not None:
        raise InvalidArgumentError(
            "--prior weights samples by their class. Images with a class for every pixel have none."
        )
    named: str | dict[str, float] = "uniform" if recipe.uniform_prior else "as in train"
    if shares is not None:
        named = prior if prior == "uniform" else dict(zip(names, shares, strict=True))
    about = {
        "name": recipe.data,
        "split": CALIBRATION_SPLIT,
        "num_samples": len(batches),
        "class_prior": named,
        "weighted": bool(abs(logits.weights_N - 1).max() > 1e-9),
        "effective_num_samples": logits.effective_num_samples,
        "sha256": fingerprint,
    }
    return Prepared(run=loaded, device=where, batches=batches, logits=logits, data=about)


def prepare_finding(
    prepared: Prepared[Logits],
    collect: Callable[[Loader], Logits],
    *,
    num_samples: int,
    data: str | None,
) -> Logits:
    """Run the network on training samples: they find what all samples set aside then test.

    Training samples are never among those set aside, and no promise needs them to be unseen.

    Args:
        prepared: The run and its samples set aside.
        collect: As for :func:`prepare`.
        num_samples: About so many at most, as many of each class as there are.
        data: As for :func:`prepare`.
    Returns:
        What the network says of them, for the population that the samples set aside stand for.
    """
    from offramp.training.data import make_loader
    from offramp.training.run import load_batches

    recipe = prepared.run.require_recipe()
    train, _, _ = load_batches(recipe, "train", data or prepared.run.data)
    rows_B = _drawn_evenly(train.strata_N, num_samples, seed=recipe.fit.seed)
    batches = train.subset(rows_B).unaugmented()
    logits = collect(make_loader(batches, batch_size=batches.run_batch_size))
    prior = prepared.logits.prior
    if prior is None or any(share and not logits.class_counts[c] for c, share in enumerate(prior)):
        return logits
    return replace(logits, prior=prior)


def _drawn_evenly(strata_N: Tensor, count: int, *, seed: int) -> Tensor:
    """Positions of about so many samples, as many of each stratum while it has any."""
    import torch

    order_N = torch.randperm(len(strata_N), generator=torch.Generator().manual_seed(seed))
    strata = torch.bincount(strata_N).nonzero()[:, 0]
    each = -(-count // len(strata))
    drawn = [order_N[strata_N[order_N] == stratum][:each] for stratum in strata]
    return torch.cat(drawn).sort().values


def _read_prior(prior: str, class_names: tuple[str, ...]) -> tuple[float, ...]:
    if prior == "uniform":
        return (1 / len(class_names),) * len(class_names)
    try:
        shares = parse_json(Path(prior).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            "Expected --prior to be uniform, or a JSON file that gives the share of each class by "
            f"its name. Cannot read {prior!r}: {error}."
        ) from error
    known = isinstance(shares, dict) and set(shares) <= set(class_names)
    if not known or not all(type(share) in (int, float) for share in shares.values()):
        raise InvalidArgumentError(
            f"Expected {prior} to give shares by class name, such as "
            f'{{"{class_names[0]}": 0.2, ...}}; classes that are left out have 0. Names: '
            f"{', '.join(class_names)}."
        )
    return tuple(float(shares.get(name, 0)) for name in class_names)


def conclude(
    prepared: Prepared[Any],
    policy: Policy | RoutingPolicy,
    *,
    asked: dict[str, Any],
    reached: dict[str, float],
    promise: dict[str, Any] | None,
    plain_macs: int,
) -> None:
    """Write a policy into the run, and print what it reached and what is promised of it.

    Args:
        prepared: The run and the samples that the policy was chosen on.
        policy: The policy.
        asked: What was asked.
        reached: Its ``accuracy`` and ``mean_macs`` on these samples, and its ``mean_iou``, where
            every pixel has a class.
        promise: The guarantee, its ``sentence``, and the split that its candidates were
            ``found_on``; None without.
        plain_macs: MACs per sample of the plain network.
    """
    from offramp.training.run import write_policy

    about = {"asked": asked, "data": prepared.data, "reached": reached, "guarantee": promise}
    write_policy(prepared.run.folder, policy, calibration=about)
    quality = f"accuracy {percent(reached['accuracy'])}"
    if "mean_iou" in reached:
        quality = f"mean IoU {percent(reached['mean_iou'])}"
    print(
        f"there: {quality} at {reached['mean_macs']:,.0f} mean MACs, "
        f"{percent(reached['mean_macs'] / plain_macs)} of the plain network's"
    )
    _print_doubt(about, prepared)
    if promise is not None:
        how = f"{promise['method']} on {promise['num_tested']:,} of the samples"
        if promise["num_finding"]:
            how += f"; prepared on {promise['num_finding']:,} {promise['found_on']} samples"
        print(f"{promise['num_passed']} of {promise['num_candidates']} candidates passed ({how})")
        print(promise["sentence"])


def _print_doubt(about: dict[str, Any], prepared: Prepared[Any]) -> None:
    """Say where the samples are too few for what was asked of them."""
    from offramp.calibration.asked import Asked, cannot_tell

    if prepared.logits.is_dense:
        return
    doubt = cannot_tell(Asked.from_record(about), prepared.logits.effective_num_samples)
    if doubt is not None:
        print(f"warning: {doubt}, or add --guarantee 0.95, which says how many a promise takes")
