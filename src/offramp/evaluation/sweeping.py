"""Running a network that one threshold steers at several of them, to choose one afterwards.

Shapes: ``K`` thresholds, ``N`` samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch

from offramp.calibration.collect import collect as collect_exits
from offramp.calibration.logits import ExitLogits
from offramp.calibration.sweep import Sweep
from offramp.data.batches import batches_of, explained_data, read_batch
from offramp.data.label_range import check_labels
from offramp.errors import DataError, InvalidArgumentError
from offramp.families import family_of
from offramp.training.checkpoint_choice import who_chose_by
from offramp.zoo import Network


@overload
def collect(
    network: Network, data: object, *, batch_size: int = 256, thresholds: None = None
) -> ExitLogits: ...


@overload
def collect(
    network: Network,
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
        InvalidArgumentError: If a threshold is not in [0, 1], or thresholds are given for a network
            that none steers.
    """
    if thresholds is None:
        return collect_exits(network, data, batch_size=batch_size)
    return collect_sweep(
        network, data, None if thresholds == "auto" else thresholds, batch_size=batch_size
    )


def collect_sweep(
    network: Network,
    data: object,
    thresholds: Sequence[float] | None = None,
    *,
    batch_size: int = 256,
) -> Sweep:
    """Run a network at each threshold, as :func:`collect` does; at 21 of them if None."""
    device = next(network.parameters()).device
    family = family_of(network)
    if family.thresholds is None:
        raise InvalidArgumentError(
            "Expected a network that one threshold steers, by gates or halting tokens. Got a "
            f"{type(network).__name__}: collect() gathers the logits of its exits."
        )
    own = family.thresholds  # in order, up to the one where most runs
    cheap_first = own
    if thresholds is not None:
        cheap_first = tuple(sorted({own[-1], *thresholds}, reverse=own[0] > own[-1]))
    runners = [family.runner(network, family.policy(threshold)) for threshold in cheap_first]
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
        thresholds=cheap_first,
        macs_KN=torch.cat(macs, dim=1),
        plain_macs=round(float(torch.cat(plain_macs).double().mean())),
        policy=family.policy,
        is_ragged=network.ragged is not None,
        checkpoint_chosen_by=chosen_by,
    )
