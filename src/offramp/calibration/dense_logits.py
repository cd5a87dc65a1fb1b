"""Logits of every exit on every pixel of labelled images.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes, ``H W`` pixels of masks, ``h w`` cells of logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self

from offramp.calibration.asked import Asked
from offramp.calibration.chosen import Figures
from offramp.calibration.logits import ExitLogits
from offramp.calibration.search import Floats
from offramp.calibration.targets import QUALITY_GAP
from offramp.errors import InvalidArgumentError
from offramp.measure.arrays import Numbers, as_array
from offramp.measure.dense import labels_of_cells, mean_iou, pixel_accuracy
from offramp.measure.outputs import IGNORED_LABEL, MAPS, Outputs


@dataclass(frozen=True, kw_only=True)
class DenseLogits(ExitLogits):
    """Logits of every exit on every pixel.

    Logits are kept at half precision and at the network's own resolution. Figures come from
    confusion matrices, which are counted at full precision and at the masks' resolution.

    Attributes:
        logits_KNC: Raw logits, shape (K, N, C, h, w), float16, on the CPU.
        labels_N: Classes, shape (N, H, W), uint8, ``IGNORED_LABEL`` where none is known.
        prior: None: images have no class of their own.
        confusion_KNCC: Pixels of each image by true and predicted class, shape (K, N, C, C), int64.
    """

    outputs: ClassVar[Outputs] = MAPS
    drop_risk: ClassVar[str] = QUALITY_GAP
    tensors_KN: ClassVar[tuple[str, ...]] = ("logits_KNC", "confusion_KNCC")

    confusion_KNCC: Numbers

    @property
    def correct_KN(self) -> Tensor:
        """Share of each image's known pixels that each exit is right about, shape (K, N)."""
        return pixel_accuracy(self._confusion)

    @property
    def _confusion(self) -> Tensor:
        return torch.as_tensor(self.confusion_KNCC)

    @property
    def scores_KN(self) -> Floats:
        """Confusion matrices, shape (K, N, C * C)."""
        scores_KN: Floats = self._confusion.flatten(2).double().numpy()
        return scores_KN

    @property
    def expected_scores_KN(self) -> Floats:
        """The scores as they are: an image's many pixels are no luck."""
        return self.scores_KN

    @property
    def plausibility_KN(self) -> Floats:
        """Share of right pixels."""
        return as_array(self.correct_KN)

    def rounded(self) -> Self:
        """Keep the logits, which are at half precision already."""
        return self

    def for_population(self, shares: tuple[float, ...] | None) -> Self:
        """Take the images as they were drawn; raise InvalidArgumentError for shares of classes."""
        if shares is not None:
            raise InvalidArgumentError(
                "--prior weights samples by their class. Images with a class for every pixel have "
                "none."
            )
        return self

    def doubt(self, asked: Asked | None) -> str | None:
        """Say nothing: how few images tell too little is not known."""
        return None

    def quality(self, mean_J: Floats) -> Floats:
        """Mean IoU, by mean confusion matrices of shape (J, C * C)."""
        num_classes = self.confusion_KNCC.shape[-1]
        matrices = torch.from_numpy(mean_J).reshape(-1, num_classes, num_classes)
        return mean_iou(matrices).numpy()

    def figures_each(self, exits_JN: Iterable[npt.NDArray[np.int64]]) -> Iterator[Figures]:
        """Mean IoU and share of right pixels, by the sum of the images' matrices."""
        for exit_N in exits_JN:
            summed_CC = self._confusion[exit_N, np.arange(len(exit_N))].sum(0)
            accuracy, of_classes = float(pixel_accuracy(summed_CC)), float(mean_iou(summed_CC))
            yield Figures(accuracy=accuracy, mean_iou=of_classes)

    def samples_at(
        self, exit_index: int
    ) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Gather the logits of every cell whose middle has a label."""
        logits_NChw = torch.as_tensor(self.logits_KNC)[exit_index]
        labels_Nhw = labels_of_cells(torch.as_tensor(self.labels_N), logits_NChw.shape[-2:])
        is_known_Nhw = labels_Nhw != IGNORED_LABEL
        image_M = is_known_Nhw.nonzero()[:, 0].numpy()
        logits_MC = logits_NChw.movedim(1, -1)[is_known_Nhw].double()
        return logits_MC.numpy(), labels_Nhw[is_known_Nhw].long().numpy(), image_M
