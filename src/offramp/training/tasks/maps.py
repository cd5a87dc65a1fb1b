"""The Lightning task that trains a network whose exits say a class for every pixel.

Shapes: ``B`` batch, ``C`` classes, ``K`` exits, ``N`` pixels, ``H W`` of masks, ``h w`` of logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.data.batches import explained_data, read_batch
from offramp.data.label_range import check_labels
from offramp.data.splits import known_labels
from offramp.errors import DataError, InvalidArgumentError
from offramp.measure.dense import (
    confusion_matrices,
    label_maps,
    labels_of_cells,
    mean_iou,
    pixel_accuracy,
)
from offramp.measure.outputs import IGNORED_LABEL, MAPS
from offramp.model.multi_exit import Features
from offramp.training.config_checks import check_class_weights
from offramp.training.tasks.exits import MultiExitTask
from offramp.training.tasks.task import ACCURACY_METRIC, Metrics

MEAN_IOU_METRIC = "mean_iou_exit_{}"
"""Name of the logged mean IoU of an exit on calibration data."""


class DenseTask(MultiExitTask):
    """Trains every exit at once on masks, and reports each exit's mean IoU.

    Args are those of :class:`~offramp.training.tasks.task.Task`. A loss of your own is given logits
    (N, C) and classes (N,) of the pixels whose class is known. Metrics of your own are not taken.
    """

    outputs = MAPS

    def check_metrics(self, metrics: Metrics | None) -> None:
        """Raise if there are any: they would be about one class a sample."""
        if metrics:
            raise InvalidArgumentError(
                "The 'metrics' parameter is about one class a sample. This network says one for "
                "every pixel: override validation_step of DenseTask."
            )

    def loss(self, inputs: Features, labels_B: Tensor) -> Tensor:
        """The joint loss over the pixels whose class is known, one a cell of the logits."""
        outputs = self._outputs(inputs)
        num_classes = outputs[-1].shape[1]
        _check(labels_B, num_classes=num_classes)
        check_class_weights(self.config.class_weights, num_classes=num_classes)
        labels_Bhw = one_pixel_a_cell(labels_B, outputs[-1].shape[-2:])
        return self._loss_of_cells(outputs, labels_Bhw, self.loss_weights(self.current_epoch))

    def judging_loss(self, outputs: Sequence[Tensor], labels_B: Tensor) -> Tensor:
        """The joint loss with the full weights, of the pixel in the middle of each cell."""
        labels_Bhw = labels_of_cells(labels_B, outputs[-1].shape[-2:])
        return self._loss_of_cells(outputs, labels_Bhw, self.config.loss_weights)

    def _loss_of_cells(
        self, outputs: Sequence[Tensor], labels_Bhw: Tensor, weights: Sequence[float] | None
    ) -> Tensor:
        is_known_Bhw = labels_Bhw != IGNORED_LABEL
        if not is_known_Bhw.any():  # the few pixels that have a class were not drawn
            return torch.stack([0 * logits.sum() for logits in outputs]).sum()
        class_weights = self.config.class_weights
        return self._joint_loss(
            [logits_BChw.movedim(1, -1)[is_known_Bhw] for logits_BChw in outputs],
            labels_Bhw[is_known_Bhw],
            weights,
            None if class_weights is None else outputs[-1].new_tensor(class_weights).float(),
        )

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        super().on_validation_epoch_start()
        self._confusion_KCC: Tensor | int = 0

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Count each exit's pixels by true and predicted class."""
        inputs, labels_BHW = read_batch(batch, self.network)
        with explained_data(inputs, self.network):
            outputs = self.answers(inputs)
        num_classes = outputs[-1].shape[1]
        _check(labels_BHW, num_classes=num_classes)
        size = (labels_BHW.shape[1], labels_BHW.shape[2])
        counts = [
            confusion_matrices(label_maps(logits, size), labels_BHW, num_classes=num_classes).sum(0)
            for logits in outputs
        ]
        self._confusion_KCC = self._confusion_KCC + torch.stack(counts).cpu()
        self._count_loss(self.judging_loss(outputs, labels_BHW), len(labels_BHW))

    def on_validation_epoch_end(self) -> None:
        """Log the loss, each exit's mean IoU, and its share of right pixels."""
        self.report_loss()
        confusion_KCC = self.over_processes(torch.as_tensor(self._confusion_KCC)).double()
        figures = {MEAN_IOU_METRIC: mean_iou, ACCURACY_METRIC: pixel_accuracy}
        for name, figure in figures.items():
            for k, value in enumerate(figure(confusion_KCC).tolist()):
                self.report(name.format(k), value)


def one_pixel_a_cell(labels_BHW: Tensor, size: torch.Size) -> Tensor:
    """Draw which pixel of each cell of coarser logits says the cell's class.

    The same of every cell; over many draws each pixel counts as much. Where cells hold no whole
    number of pixels, the nearest pixel to the middle.
    """
    down, right = (labels_BHW.shape[1] / size[0], labels_BHW.shape[2] / size[1])
    if down == int(down) and right == int(right):
        y = int(torch.randint(int(down), ()))
        x = int(torch.randint(int(right), ()))
        return labels_BHW[:, y :: int(down), x :: int(right)]
    return labels_of_cells(labels_BHW, size)


def _check(labels_BHW: Tensor, *, num_classes: int) -> None:
    known_N = known_labels(labels_BHW)
    if len(known_N) == 0:
        raise DataError("Expected masks with a class somewhere. Got a batch that has none.")
    check_labels(known_N, num_classes=num_classes)
