"""Every exit's logits over a data set, computed once.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.errors import DataError, ShapeError
from offramp.measure.cost import ExitCosts, evaluation_mode
from offramp.model.multi_exit import MultiExitNetwork
from offramp.runtime import Session
from offramp.runtime.session import check_inputs


@dataclass(frozen=True, kw_only=True)
class ExitLogits:
    """What every exit says about every sample, and what the exits cost.

    Attributes:
        logits_KNC: Raw logits, shape (K, N, C), float32, on the CPU.
        labels_N: Classes, shape (N,), int64, on the CPU.
        costs: MACs per sample of each stage and head.
        numbers: Of each exit in the network, ascending; 0 to K - 1 if left out.
    """

    logits_KNC: Tensor
    labels_N: Tensor
    costs: ExitCosts
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.numbers:
            object.__setattr__(self, "numbers", tuple(range(self.costs.num_exits)))
        expected = (self.costs.num_exits, len(self.labels_N))
        if self.logits_KNC.ndim != 3 or self.logits_KNC.shape[:2] != expected:
            raise ShapeError(
                f"Expected logits of shape (K, N, C) for K = {self.costs.num_exits} exits and "
                f"N = {len(self.labels_N)} labels. Got {tuple(self.logits_KNC.shape)}."
            )
        if len(self.numbers) != self.costs.num_exits:
            raise ShapeError(
                f"Expected {self.costs.num_exits} numbers, one per exit. Got {self.numbers}."
            )

    @property
    def correct_KN(self) -> Tensor:
        """Whether each exit is right about each sample, shape (K, N), bool."""
        return self.logits_KNC.argmax(-1) == self.labels_N


@torch.inference_mode()
def collect(network: MultiExitNetwork, loader: Iterable[tuple[Tensor, Tensor]]) -> ExitLogits:
    """Run every exit on every sample of a loader.

    Args:
        network: The network; it runs in evaluation mode where its parameters are.
        loader: Batches of (inputs, labels).
    Returns:
        The logits of all exits, with labels and costs.
    Raises:
        DataError: If the loader yields no sample.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    outputs, labels, costs = [], [], None
    with evaluation_mode(network):
        for inputs, labels_B in loader:
            inputs = inputs.to(device)
            if costs is None:
                costs = network.costs(inputs)
            outputs.append(torch.stack(network(inputs)).float().cpu())
            labels.append(labels_B.cpu())
    if costs is None:
        raise DataError("Expected at least one batch of samples to collect logits from. Got none.")
    return ExitLogits(logits_KNC=torch.cat(outputs, dim=1), labels_N=torch.cat(labels), costs=costs)


def collect_from_session(session: Session, loader: Iterable[tuple[Tensor, Tensor]]) -> ExitLogits:
    """Run every step of a bundle on every sample of a loader, letting nobody leave.

    Args:
        session: Runs the bundle.
        loader: Batches of (inputs, labels).
    Returns:
        The logits of every step's exit: exits that are off in the bundle have none, so that the
        steps count as exits, numbered as in the network.
    Raises:
        DataError: If the loader yields no sample.
        ShapeError: If the inputs are not of the shape that the bundle was exported for.
    """
    outputs, labels = [], []
    for inputs, labels_B in loader:
        carried: list[Any] = check_inputs(session.bundle, [inputs])
        of_steps = []
        for index in range(len(session.bundle.steps)):
            _, (output, _, _, *carried) = session.run_step(index, carried)
            of_steps.append(torch.from_numpy(output))
        outputs.append(torch.stack(of_steps))
        labels.append(labels_B)
    if not labels:
        raise DataError("Expected at least one batch of samples to collect logits from. Got none.")
    steps = session.bundle.steps
    costs = ExitCosts(
        stage_macs=tuple(step.stage_macs for step in steps),
        head_macs=tuple(step.head_macs for step in steps),
    )
    return ExitLogits(
        logits_KNC=torch.cat(outputs, dim=1),
        labels_N=torch.cat(labels),
        costs=costs,
        numbers=tuple(step.exit_index for step in steps),
    )
