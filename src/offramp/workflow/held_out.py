"""The samples that a run set aside, and what its network says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from offramp.calibration.collect import collect
from offramp.calibration.evidence import Evidence
from offramp.data.images import Batches, in_tensors
from offramp.evaluation.sweeping import collect_sweep
from offramp.families import family_of
from offramp.measure.outputs import MAPS
from offramp.runs.own_network import num_inputs_of
from offramp.runs.run import Run, load_batches
from offramp.runtime.chosen_on import written_hashes
from offramp.workflow.artifact import pick_device
from offramp.workflow.population import describe_population, name_prior, read_prior
from offramp.workflow.recipe_samples import RecipeSamples
from offramp.workflow.samples import CALIBRATION, AnySamples, OwnSamples
from offramp.zoo import Network

_NUM_FINDING, _NUM_SIZING = 4_000, 1_000
"""Training samples that find the candidates of a promise, or size its bets where they are fixed."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A run with what its network says of the samples set aside.

    Attributes:
        run: The run.
        device: Where its network is.
        batches: The samples.
        evidence: What every exit says of them, or the network at every threshold.
        data: What the policy file says of them.
    """

    run: Run
    device: str
    batches: Batches
    evidence: Evidence[Any]
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def population(self) -> str:
        """Name what the samples stand for."""
        prior = self.data["class_prior"]
        words = f"{self.data['name']}, classes {'as given' if isinstance(prior, dict) else prior}"
        if not self.data["weighted"]:
            return words
        effective = self.data["effective_num_samples"]
        return f"{words} by weights, effective number {effective:,.0f}"


def samples_of_run(run: Run) -> AnySamples:
    """Make what loads splits of the data that a run is for."""
    if run.recipe is not None:
        return RecipeSamples(recipe=run.recipe, data=run.data, class_names=run.class_names)
    return OwnSamples(
        of=f"run {run.folder}",
        preprocessing=run.preprocessing,
        class_names=run.class_names,
        num_classes=run.num_classes,
        num_inputs=num_inputs_of(run.network),
        maps=run.network.outputs.name == MAPS.name,
        data=run.data,
    )


def evidence_by(network: Network) -> Callable[[object], Evidence[Any]]:
    """Make the function from samples to all that choosing needs to know of them."""
    return partial(collect if family_of(network).thresholds is None else collect_sweep, network)


def hold_out(
    run: Run, *, data: str | None = None, device: str | None = None, prior: str | None = None
) -> HeldOut:
    """Run the network on the samples set aside.

    The prior is uniform, a JSON file with the share of each class, or None: as they were drawn.
    """
    where = pick_device(device)
    samples = samples_of_run(run).load(data=data, preferred=CALIBRATION)
    batches, names = in_tensors(samples.batches), samples.class_names
    shares = None if prior is None else read_prior(prior, names)
    network = run.network.to(where)
    evidence = evidence_by(network)(batches).for_population(shares)
    about = {
        "name": samples.name,
        "split": samples.split,
        "num_samples": len(batches),
        **describe_population(evidence, name_prior(prior, shares, names) or samples.class_prior),
        "sha256": samples.fingerprint,
        "hashes": written_hashes(batches.hashes()),
    }
    return HeldOut(run=run, device=where, batches=batches, evidence=evidence, data=about)


def find_on_train(held_out: HeldOut, *, data: str | None) -> Evidence[Any]:
    """Run the network on training samples: they find what all samples set aside then test.

    Training samples are never among those set aside, and no promise needs them to be unseen.
    """
    run, known = held_out.run, held_out.evidence
    recipe = run.require_recipe()
    train, _, _ = load_batches(recipe, "train", data or run.data)
    count = _NUM_SIZING if known.has_fixed_candidates else _NUM_FINDING
    rows_B = _drawn_evenly(train.strata_N, count, seed=recipe.fit.seed)
    batches = train.subset(rows_B).unaugmented()
    found = evidence_by(run.network)(batches)
    prior = known.prior
    if prior is None or any(share and not found.class_counts[c] for c, share in enumerate(prior)):
        return found
    return replace(found, prior=prior)


def _drawn_evenly(strata_N: Tensor, count: int, *, seed: int) -> Tensor:
    """Positions of about so many samples, as many of each stratum while it has any."""
    order_N = torch.randperm(len(strata_N), generator=torch.Generator().manual_seed(seed))
    strata = torch.bincount(strata_N).nonzero()[:, 0]
    each = -(-count // len(strata))
    drawn = [order_N[strata_N[order_N] == stratum][:each] for stratum in strata]
    return torch.cat(drawn).sort().values
