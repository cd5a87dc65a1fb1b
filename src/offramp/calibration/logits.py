"""What every exit says of labelled samples: a class for each, or one for every pixel.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes, ``H W`` pixels of masks, ``h w`` cells of logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self

from offramp.calibration.labelled import LabelledLogits
from offramp.calibration.search import Floats
from offramp.errors import InvalidArgumentError, ShapeError
from offramp.measure.cost import ExitCosts
from offramp.measure.dense import (
    IGNORED_LABEL,
    labels_of_cells,
    mean_iou,
    pixel_accuracy,
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How good answers are.

    Attributes:
        accuracy: Share of right ones, a fraction; of right pixels, where every pixel has a class.
        mean_iou: Mean intersection over union; None where a sample has one class.
    """

    accuracy: float
    mean_iou: float | None = None

    @property
    def quality(self) -> float:
        """The figure that counts."""
        return self.accuracy if self.mean_iou is None else self.mean_iou


@dataclass(frozen=True, kw_only=True)
class ExitLogits(LabelledLogits):
    """What every exit says about every sample, and what the exits cost.

    Attributes:
        logits_KNC: Raw logits, shape (K, N, C), float32, on the CPU.
        labels_N: Classes, shape (N,), int64, on the CPU.
        prior: Share of each class in the population that figures are about, C numbers that sum
            to 1, none negative; None where the samples are drawn from it as they are.
        costs: MACs per sample of each stage and head.
        numbers: Of each exit in the network, ascending; 0 to K - 1 if left out.
    """

    costs: ExitCosts
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.numbers:
            object.__setattr__(self, "numbers", tuple(range(self.costs.num_exits)))
        expected = (self.costs.num_exits, len(self.labels_N))
        num_axes = 5 if self.is_dense else 3
        if self.logits_KNC.ndim != num_axes or self.logits_KNC.shape[:2] != expected:
            raise ShapeError(
                f"Expected logits of shape (K, N, C{', H, W' if self.is_dense else ''}) for "
                f"K = {self.costs.num_exits} exits and N = {len(self.labels_N)} labels. "
                f"Got {tuple(self.logits_KNC.shape)}."
            )
        if len(self.numbers) != self.costs.num_exits:
            raise ShapeError(
                f"Expected {self.costs.num_exits} numbers, one per exit. Got {self.numbers}."
            )
        super().__post_init__()

    @property
    def scores_KN(self) -> Floats:
        """What samples count at each exit: of their mean, :meth:`quality` is to be high.

        Shape (K, N), or (K, N, D) where they are vectors.
        """
        return self.correct_KN.double().numpy()

    def quality(self, mean_J: Floats) -> Floats:
        """How good answers are by the mean of their scores: the accuracy, which is that mean.

        Args:
            mean_J: Mean scores of several ways to answer, shape (J,) or (J, D).
        Returns:
            Fractions, shape (J,).
        """
        return mean_J

    @property
    def quality_K(self) -> Floats:
        """Quality of each exit, shape (K,)."""
        return self.quality(np.average(self.scores_KN, axis=1, weights=self.weights_N))

    def figures(self, exit_N: npt.NDArray[np.int64]) -> Figures:
        """How good the answers are that samples get by certain exits.

        Args:
            exit_N: Number of an exit for each sample, counted in these logits, shape (N,).
        Returns:
            The figures.
        """
        left_by = self.correct_KN.double().numpy()[exit_N, np.arange(len(exit_N))]
        return Figures(accuracy=float(np.average(left_by, weights=self.weights_N)))

    def samples_at(self, exit_index: int) -> tuple[Tensor, Tensor, npt.NDArray[np.int64]]:
        """What an exit says of everything that has a label.

        Args:
            exit_index: Which exit, counted in these logits.
        Returns:
            logits: Shape (M, C), float64.
            labels: Shape (M,), int64.
            sample: The sample that each belongs to, shape (M,).
        """
        logits_NC = self.logits_KNC[exit_index].detach().double()
        return logits_NC, self.labels_N.long(), np.arange(len(self.labels_N))


@dataclass(frozen=True, kw_only=True)
class DenseLogits(ExitLogits):
    """What every exit says of every pixel.

    Logits are kept at half precision and at the network's own resolution. Figures come from
    confusion matrices, which are counted at full precision and at the masks' resolution.

    Attributes:
        logits_KNC: Raw logits, shape (K, N, C, h, w), float16, on the CPU.
        labels_N: Classes, shape (N, H, W), uint8, ``IGNORED_LABEL`` where none is known.
        prior: None: images have no class of their own.
        confusion_KNCC: Pixels of each image by true and predicted class, shape (K, N, C, C), int64.
    """

    is_dense: ClassVar[bool] = True

    confusion_KNCC: Tensor

    @property
    def correct_KN(self) -> Tensor:
        """Share of each image's known pixels that each exit is right about, shape (K, N)."""
        return pixel_accuracy(self.confusion_KNCC)

    @property
    def scores_KN(self) -> Floats:
        """Confusion matrices, shape (K, N, C * C)."""
        return self.confusion_KNCC.flatten(2).double().numpy()

    def quality(self, mean_J: Floats) -> Floats:
        """Mean IoU, by mean confusion matrices of shape (J, C * C)."""
        num_classes = self.confusion_KNCC.shape[-1]
        matrices = torch.from_numpy(mean_J).reshape(-1, num_classes, num_classes)
        return mean_iou(matrices).numpy()

    def figures(self, exit_N: npt.NDArray[np.int64]) -> Figures:
        """Mean IoU and share of right pixels, by the sum of the images' matrices."""
        summed_CC = self.confusion_KNCC[torch.from_numpy(exit_N), torch.arange(len(exit_N))].sum(0)
        return Figures(
            accuracy=float(pixel_accuracy(summed_CC)), mean_iou=float(mean_iou(summed_CC))
        )

    def samples_at(self, exit_index: int) -> tuple[Tensor, Tensor, npt.NDArray[np.int64]]:
        """What an exit says of every cell whose middle has a label."""
        logits_NChw = self.logits_KNC[exit_index]
        labels_Nhw = labels_of_cells(self.labels_N, logits_NChw.shape[-2:])
        is_known_Nhw = labels_Nhw != IGNORED_LABEL
        image_M = is_known_Nhw.nonzero()[:, 0].numpy()
        logits_MC = logits_NChw.movedim(1, -1)[is_known_Nhw].double()
        return logits_MC, labels_Nhw[is_known_Nhw].long(), image_M

    def take(self, rows: npt.ArrayLike) -> Self:
        """Some of the images."""
        rows_N = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        return replace(
            self,
            logits_KNC=self.logits_KNC[:, rows_N],
            labels_N=self.labels_N[rows_N],
            confusion_KNCC=self.confusion_KNCC[:, rows_N],
        )


def check_same_network(one: ExitLogits, other: ExitLogits) -> None:
    """Refuse logits of different networks where they are to be used together.

    Args:
        one: Every exit's logits on some samples.
        other: The same on others.
    Raises:
        InvalidArgumentError: If their exits have other numbers or costs.
        ShapeError: If they differ in the number of exits or classes.
    """
    shapes = [(len(each.logits_KNC), each.logits_KNC.shape[2]) for each in (one, other)]
    if shapes[0] != shapes[1]:
        raise ShapeError(
            "Expected logits of the same exits and classes. "
            f"Got {shapes[0][0]} exits and {shapes[0][1]} classes against {shapes[1][0]} and "
            f"{shapes[1][1]}."
        )
    of_both = [(each.numbers, None if each.is_ragged else each.costs) for each in (one, other)]
    if of_both[0] != of_both[1]:
        raise InvalidArgumentError(
            f"Expected logits of the same network. Got exits {one.numbers} that cost "
            f"{one.costs.exit_macs()} MACs against {other.numbers} that cost "
            f"{other.costs.exit_macs()}."
        )


def require_logits(*given: object) -> None:
    """Refuse networks, loaders and what else is no logits yet.

    Args:
        given: What shall be every exit's logits.
    Raises:
        InvalidArgumentError: If one is not.
    """
    for each in given:
        if not isinstance(each, ExitLogits):
            raise InvalidArgumentError(
                "Expected every exit's logits on held-out samples, as collect(network, data) "
                f"returns them. Got a {type(each).__name__}."
            )
