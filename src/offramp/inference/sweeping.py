"""Running a network that one threshold steers at several of them, to choose one afterwards.

Shapes: ``K`` thresholds, ``N`` samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.calibration.sweep import Sweep
from offramp.errors import DataError
from offramp.inference.runner import make_runner
from offramp.model.multi_exit import as_inputs
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy, RoutingPolicy
from offramp.routing.halting import HaltingNetwork
from offramp.routing.skip import SkipNetwork
from offramp.training.checkpoint_choice import who_chose_by

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


def collect_sweep(
    network: SteeredNetwork,
    loader: Iterable[tuple[Any, Tensor]],
    thresholds: Sequence[float] | None = None,
) -> Sweep:
    """Run a network that skips blocks or drops tokens at each of several thresholds.

    Args:
        network: The network; it is put in evaluation mode, and runs where its parameters are.
        loader: Batches of (inputs, labels).
        thresholds: For the probability with which a gate runs its block, or for the sum of scores
            at which a token halts, each in [0, 1]; the one at which most runs, 0 for gates and 1
            for tokens, is always among them. 21 of them if None.
    Returns:
        What it says of every sample at each, and the MACs that ran.
    Raises:
        DataError: If the loader yields no sample.
        InvalidArgumentError: If a threshold is not in [0, 1].
    """
    device = next(network.parameters()).device
    cheap_first = _cheap_first(network, thresholds)
    policy = steering_policy(network)
    runners = [make_runner(network, policy(threshold)) for threshold in cheap_first]
    outputs, macs, plain_macs, labels, chosen_by = [], [], [], [], ""
    for batch, labels_B in loader:
        inputs = as_inputs(batch, device)
        chosen_by = chosen_by or who_chose_by(network, inputs)
        results = [runner.run(*inputs) for runner in runners]
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
