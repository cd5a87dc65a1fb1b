"""Running a network that one threshold steers at several of them, to choose one afterwards.

Shapes: ``K`` thresholds, ``N`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from offramp.calibration.collect import collect as collect_exits
from offramp.calibration.logits import ExitLogits
from offramp.calibration.sweep import Sweep
from offramp.errors import DataError
from offramp.inference.runner import make_runner
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy, RoutingPolicy
from offramp.routing.halting import HaltingNetwork
from offramp.routing.skip import SkipNetwork
from offramp.training.checkpoint_choice import who_chose_by
from offramp.training.labels import check_labels
from offramp.training.samples import batches_of, explained_data, read_batch
from offramp.zoo import Network

SteeredNetwork = SkipNetwork | HaltingNetwork
"""A network of one exit that one threshold steers inside."""

_EVEN_SCORES = tuple(1 / (1 + math.exp(-step * 2 / 3)) for step in range(-9, 10))
"""Probabilities at even steps of a score, from -6 to 6: trained gates and tokens are mostly sure,
so that even steps of probability would part few of them. They are set before any sample is seen, as
a guarantee needs them to be."""

GATE_THRESHOLDS = (0.0, *_EVEN_SCORES, 1.0)
"""Of gates: at 0 every block runs."""

HALTING_THRESHOLDS = (*sorted((*_EVEN_SCORES, HaltingPolicy.threshold)), 1.0)
"""Of tokens that halt: that of training is among them, and 1, where they stay longest."""


@overload
def collect(
    network: Network, data: object, *, batch_size: int = 256, thresholds: None = None
) -> ExitLogits: ...


@overload
def collect(
    network: SteeredNetwork,
    data: object,
    *,
    batch_size: int = 256,
    thresholds: Sequence[float] | Literal["auto"],
) -> Sweep: ...


def collect(
    network: Any,
    data: object,
    *,
    batch_size: int = 256,
    thresholds: Sequence[float] | Literal["auto"] | None = None,
) -> ExitLogits | Sweep:
    """Run every exit on every sample of a data set, or a network at each of several thresholds.

    Args:
        network: The network; it runs in evaluation mode where its parameters are. Of one that
            skips blocks, the only exit is collected, with every block run and no gate; of one whose
            tokens halt, with a threshold of 1, at which they stay longest, and the costs are those
            of the plain network: unless ``thresholds`` are given.
        data: A DataLoader, a data set, tensors (inputs, labels), or batches of (inputs, labels) or
            dicts; the inputs are a tuple or a dict where the network takes several.
        batch_size: Samples a batch, where the data does not say it.
        thresholds: Of a network that skips blocks or drops tokens, what :func:`~offramp.calibrate`
            is to choose from, each in [0, 1]: for the probability with which a gate runs its block,
            or for the sum of scores at which a token halts. "auto" for 21 that suit most networks;
            the one at which most runs, 0 for gates and 1 for tokens, is always among them.
    Returns:
        The logits of all exits, with labels and costs; of a network that says a class for every
        pixel, ``DenseLogits``; where thresholds are given, a ``Sweep``.
    Raises:
        DataError: If there is no sample, a sample has no label or one that the network has no class
            for, or the network cannot take the inputs.
        InvalidArgumentError: If a threshold is not in [0, 1].
        NotCalibratedError: If thresholds are given for a network with several exits.
    """
    if thresholds is None:
        return collect_exits(network, data, batch_size=batch_size)
    return collect_sweep(
        network, data, None if thresholds == "auto" else thresholds, batch_size=batch_size
    )


def collect_sweep(
    network: SteeredNetwork,
    data: object,
    thresholds: Sequence[float] | None = None,
    *,
    batch_size: int = 256,
) -> Sweep:
    """Run a network at each threshold, as :func:`collect` does; at 21 of them if None."""
    device = next(network.parameters()).device
    cheap_first = _cheap_first(network, thresholds)
    policy = steering_policy(network)
    runners = [make_runner(network, policy(threshold)) for threshold in cheap_first]
    outputs, macs, plain_macs, labels, chosen_by = [], [], [], [], ""
    for batch in batches_of(data, batch_size=batch_size):
        inputs, labels_B = read_batch(batch, network, device=device)
        chosen_by = chosen_by or who_chose_by(network, inputs)
        with explained_data(inputs, network):
            results = [runner.run(*inputs) for runner in runners]
        check_labels(labels_B, num_classes=results[-1].output.shape[-1])
        outputs.append(torch.stack([result.output for result in results]).float().cpu())
        macs.append(torch.stack([result.macs for result in results]).cpu())
        plain_macs.append(network.plain_macs(*inputs))
        labels.append(labels_B.cpu())
    if not labels:
        raise DataError("Expected at least one batch of samples to run. Got none.")
    return Sweep(
        logits_KNC=torch.cat(outputs, dim=1),
        labels_N=torch.cat(labels),
        thresholds=tuple(cheap_first),
        macs_KN=torch.cat(macs, dim=1),
        plain_macs=round(float(torch.cat(plain_macs).double().mean())),
        policy=policy,
        is_ragged=isinstance(network, HaltingNetwork) and network.ragged is not None,
        checkpoint_chosen_by=chosen_by,
    )


def steering_policy(network: SteeredNetwork) -> type[RoutingPolicy]:
    """The kind of policy that a network takes.

    Args:
        network: The network.
    Returns:
        A class that makes the policy of a threshold.
    """
    return GatePolicy if isinstance(network, SkipNetwork) else HaltingPolicy


def _cheap_first(network: SteeredNetwork, thresholds: Sequence[float] | None) -> list[float]:
    if isinstance(network, SkipNetwork):
        asked = GATE_THRESHOLDS if thresholds is None else thresholds
        return sorted({0.0, *asked}, reverse=True)
    asked = HALTING_THRESHOLDS if thresholds is None else thresholds
    return sorted({1.0, *asked})
