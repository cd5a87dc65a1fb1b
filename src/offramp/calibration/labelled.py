"""Logits of several ways of answering labelled samples: exits, or settings of one threshold.

Shapes: ``K`` ways, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from offramp.errors import DataError, InSampleError, InvalidArgumentError
from offramp.measure.arrays import Numbers, as_array
from offramp.measure.outputs import LABELS, Outputs


@dataclass(frozen=True, kw_only=True)
class LabelledLogits:
    """Logits of every way of answering, from cheap to dear; the last is what others lose against.

    Attributes:
        logits_KNC: Raw logits, shape (K, N, C), float32, a tensor on the CPU or an array.
        labels_N: Classes, shape (N,), int64, likewise.
        prior: Share of each class in the population that figures are about, C numbers that sum
            to 1, none negative; None where the samples are drawn from it as they are.
        outputs: What each way says of a sample.
        is_ragged: Whether samples have lengths of their own, so that what they cost on average
            differs from data to data.
        checkpoint_chosen_by: The callback or scheduler of ``fit`` that went by some of these
            samples, so that the network depends on them; empty if none did.
    """

    outputs: ClassVar[Outputs] = LABELS

    tensors_KN: ClassVar[tuple[str, ...]] = ("logits_KNC",)
    """Fields that hold something of every way and sample, shape (K, N, ...)."""

    logits_KNC: Numbers
    labels_N: Numbers
    prior: tuple[float, ...] | None = None
    is_ragged: bool = False
    checkpoint_chosen_by: str = ""

    def __post_init__(self) -> None:
        if len(self.labels_N) == 0:
            raise DataError("Expected logits of at least one sample. Got none.")
        if self.prior is not None:
            self._check_prior(self.prior)

    def require_independent(self) -> None:
        """Refuse a guarantee on samples that the network depends on.

        Raises:
            InSampleError: If they chose its checkpoint.
        """
        if self.checkpoint_chosen_by:
            raise InSampleError(
                "A guarantee needs samples that the network does not depend on. Some of these "
                f"chose its checkpoint in training ({self.checkpoint_chosen_by}): train with a "
                "validation part (validation_share, or validation=...), or give other samples."
            )

    @property
    def correct_KN(self) -> Any:
        """True where a way is right about a sample, shape (K, N), bool; tensor or array as they."""
        return self.logits_KNC.argmax(-1) == self.labels_N

    @property
    def predicted_KN(self) -> npt.NDArray[np.int64]:
        """The class that each way says of a sample, shape (K, N)."""
        predicted_KN: npt.NDArray[np.int64] = as_array(self.logits_KNC).argmax(-1)
        return predicted_KN

    @property
    def class_counts(self) -> npt.NDArray[np.int64]:
        """Samples of each class, shape (C,)."""
        return np.bincount(as_array(self.labels_N), minlength=self.logits_KNC.shape[2])

    @property
    def weights_N(self) -> npt.NDArray[np.float64]:
        """Weights of the samples, shape (N,), 1 on average.

        All 1 without a prior; with one, a class counts as much as its share in the population,
        whatever its share of these samples.
        """
        if self.prior is None:
            return np.ones(len(self.labels_N))
        per_class_C = np.asarray(self.prior) * len(self.labels_N) / self.class_counts.clip(min=1)
        weights_N: npt.NDArray[np.float64] = per_class_C[as_array(self.labels_N)]
        return weights_N

    @property
    def effective_num_samples(self) -> float:
        """Number of samples of equal weight that tell a mean as well; N where all weights are 1.

        Reference: Kish (1965), Survey Sampling: the square of the sum of the weights over the sum
            of their squares.
        """
        weights_N = self.weights_N
        return float(weights_N.sum() ** 2 / (weights_N**2).sum())

    def for_population(self, shares: tuple[float, ...] | None) -> Self:
        """Let the samples, drawn class by class, stand for a population of some shares of classes.

        None stands for the shares that were drawn.
        """
        drawn = tuple((self.class_counts / len(self.labels_N)).tolist())
        return replace(self, prior=shares or drawn)

    def take(self, rows: npt.ArrayLike) -> Self:
        """Some of the samples, for the same population.

        Args:
            rows: Their numbers, in any order and as often as wanted.
        Returns:
            The samples; they have weights of their own.
        Raises:
            DataError: If a class of the population is not among them.
        """
        rows_N = np.asarray(rows, dtype=np.int64)
        taken: dict[str, Any] = {name: getattr(self, name)[:, rows_N] for name in self.tensors_KN}
        return replace(self, labels_N=self.labels_N[rows_N], **taken)

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
