"""Every exit's logits over a data set, computed once.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.artifacts import atomic_path
from offramp.errors import ArtifactError, DataError, InvalidArgumentError, ShapeError
from offramp.measure.cost import ExitCosts, evaluation_mode
from offramp.model.multi_exit import MultiExitNetwork, as_inputs
from offramp.runtime import Session
from offramp.runtime.session import check_inputs

_ABOUT = "exits"
"""Where a file of logits says what its exits cost."""


@dataclass(frozen=True, kw_only=True)
class ExitLogits:
    """What every exit says about every sample, and what the exits cost.

    Attributes:
        logits_KNC: Raw logits, shape (K, N, C), float32, on the CPU.
        labels_N: Classes, shape (N,), int64, on the CPU.
        costs: MACs per sample of each stage and head.
        numbers: Of each exit in the network, ascending; 0 to K - 1 if left out.
        prior: Share of each class in the population that figures are about, C numbers that sum
            to 1, none negative; None where the samples are drawn from it as they are.
    """

    logits_KNC: Tensor
    labels_N: Tensor
    costs: ExitCosts
    numbers: tuple[int, ...] = ()
    prior: tuple[float, ...] | None = None

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
        if self.prior is not None:
            self._check_prior(self.prior)

    @property
    def correct_KN(self) -> Tensor:
        """Whether each exit is right about each sample, shape (K, N), bool."""
        return self.logits_KNC.argmax(-1) == self.labels_N

    @property
    def class_counts(self) -> npt.NDArray[np.int64]:
        """Samples of each class, shape (C,)."""
        return np.bincount(self.labels_N.numpy(), minlength=self.logits_KNC.shape[2])

    @property
    def weights_N(self) -> npt.NDArray[np.float64]:
        """How much each sample counts, shape (N,), 1 on average.

        All 1 without a prior; with one, a class counts as much as its share in the population,
        whatever its share of these samples.
        """
        if self.prior is None:
            return np.ones(len(self.labels_N))
        per_class_C = np.asarray(self.prior) * len(self.labels_N) / self.class_counts.clip(min=1)
        weights_N: npt.NDArray[np.float64] = per_class_C[self.labels_N.numpy()]
        return weights_N

    @property
    def effective_num_samples(self) -> float:
        """How many samples of equal weight would tell a mean as well; N where all weights are 1.

        Reference: Kish (1965), Survey Sampling: the square of the sum of the weights over the sum
            of their squares.
        """
        weights_N = self.weights_N
        return float(weights_N.sum() ** 2 / (weights_N**2).sum())

    def take(self, rows: npt.ArrayLike) -> ExitLogits:
        """Some of the samples, for the same population.

        Args:
            rows: Their numbers, in any order and as often as wanted.
        Returns:
            The samples; they have weights of their own.
        Raises:
            DataError: If a class of the population is not among them.
        """
        rows_N = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        return replace(self, logits_KNC=self.logits_KNC[:, rows_N], labels_N=self.labels_N[rows_N])

    def _check_prior(self, prior: tuple[float, ...]) -> None:
        num_classes = self.logits_KNC.shape[2]
        shares_C = np.asarray(prior, dtype=np.float64)
        is_share = shares_C.shape == (num_classes,) and (shares_C >= 0).all()
        if not is_share or abs(shares_C.sum() - 1) > 1e-6:
            raise InvalidArgumentError(
                f"The 'prior' parameter must hold {num_classes} shares, one per class, none "
                f"negative, that sum to 1. Got {len(prior)} that sum to {shares_C.sum():.6g}, the "
                f"lowest {shares_C.min():.6g}."
            )
        missing = np.flatnonzero((shares_C > 0) & (self.class_counts == 0))
        if len(missing):
            raise DataError(
                f"Expected samples of every class of the prior. Got none of {len(missing)} "
                f"classes, class {missing[0]} the first: give more samples, or a prior of 0 there."
            )


@torch.inference_mode()
def collect(network: MultiExitNetwork, loader: Iterable[tuple[Any, Tensor]]) -> ExitLogits:
    """Run every exit on every sample of a loader.

    Args:
        network: The network; it runs in evaluation mode where its parameters are.
        loader: Batches of (inputs, labels); inputs is a tuple where the network takes several.
    Returns:
        The logits of all exits, with labels and costs.
    Raises:
        DataError: If the loader yields no sample.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    outputs, labels, lengths = [], [], []
    inputs = None
    with evaluation_mode(network):
        for batch, labels_B in loader:
            inputs = as_inputs(batch, device)
            outputs.append(torch.stack(network(*inputs)).float().cpu())
            labels.append(labels_B.cpu())
            if network.ragged is not None:
                lengths.append(network.ragged.lengths(inputs))
    if inputs is None:
        raise DataError("Expected at least one batch of samples to collect logits from. Got none.")
    if lengths:
        costs = network.costs_of_lengths(torch.cat(lengths), inputs)
    else:
        costs = network.costs(*inputs)
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
    for batch, labels_B in loader:
        carried: list[Any] = check_inputs(session.bundle, as_inputs(batch))
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


def write_logits(path: Path | str, logits: ExitLogits) -> None:
    """Keep logits in a file, at half precision, so that choosing need not run the network again.

    Args:
        path: The file to write, a safetensors file.
        logits: Every exit's logits; a prior is not kept.
    Raises:
        ArtifactError: If the file cannot be written.
    """
    tensors = {"logits_KNC": logits.logits_KNC.half().contiguous(), "labels_N": logits.labels_N}
    about = {
        "stage_macs": logits.costs.stage_macs,
        "head_macs": logits.costs.head_macs,
        "numbers": logits.numbers,
    }
    with atomic_path(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={_ABOUT: json.dumps(about)})


def read_logits(path: Path | str) -> ExitLogits:
    """Read logits that :func:`write_logits` kept.

    Args:
        path: The file.
    Returns:
        The logits, as far as half precision holds them.
    Raises:
        ArtifactError: If the file is missing, damaged, or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()[_ABOUT])
            return ExitLogits(
                logits_KNC=file.get_tensor("logits_KNC").float(),
                labels_N=file.get_tensor("labels_N"),
                costs=ExitCosts(
                    stage_macs=tuple(about["stage_macs"]), head_macs=tuple(about["head_macs"])
                ),
                numbers=tuple(about["numbers"]),
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"Expected logits of every exit in {path}, found none or damaged ones ({error})."
        ) from error
