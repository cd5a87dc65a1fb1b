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
from offramp.inference.skipping import SkipRunner
from offramp.model.multi_exit import as_inputs
from offramp.policy.gate_policy import GatePolicy
from offramp.routing.skip import SkipNetwork

GATE_THRESHOLDS = (0.0, *(1 / (1 + math.exp(-step * 2 / 3)) for step in range(-9, 10)), 1.0)
"""Probabilities at even steps of a gate's score, from -6 to 6: trained gates are mostly sure, so
that even steps of probability would part few of them. They are set before any sample is seen, as a
guarantee needs them to be."""


def collect_sweep(
    network: SkipNetwork,
    loader: Iterable[tuple[Any, Tensor]],
    thresholds: Sequence[float] = GATE_THRESHOLDS,
) -> Sweep:
    """Run a network that skips blocks on every sample of a loader, at each of several thresholds.

    Args:
        network: The network; it is put in evaluation mode, and runs where its parameters are.
        loader: Batches of (inputs, labels).
        thresholds: For the probability with which a gate runs its block, each in [0, 1]; 0, where
            every block runs, is always among them.
    Returns:
        What it says at each, and the MACs that ran.
    Raises:
        DataError: If the loader yields no sample.
        InvalidArgumentError: If a threshold is not in [0, 1].
    """
    device = next(network.parameters()).device
    cheap_first = sorted({0.0, *thresholds}, reverse=True)
    runners = [SkipRunner(network, GatePolicy(threshold)) for threshold in cheap_first]
    outputs, macs, labels = [], [], []
    inputs = None
    for batch, labels_B in loader:
        inputs = as_inputs(batch, device)
        results = [runner.run(*inputs) for runner in runners]
        outputs.append(torch.stack([result.output for result in results]).float().cpu())
        macs.append(torch.stack([result.macs for result in results]).cpu())
        labels.append(labels_B.cpu())
    if inputs is None:
        raise DataError("Expected at least one batch of samples to run. Got none.")
    return Sweep(
        logits_KNC=torch.cat(outputs, dim=1),
        labels_N=torch.cat(labels),
        thresholds=tuple(cheap_first),
        macs_KN=torch.cat(macs, dim=1),
        plain_macs=network.costs(*inputs).plain_macs,
    )
