"""Dense outputs, a class for every pixel: label maps, confusion matrices, mean IoU.

Shapes: ``B`` batch, ``C`` classes, ``H W`` pixels of the labels, ``h w`` cells of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from offramp.errors import DataError, ShapeError
from offramp.measure.arrays import Numbers
from offramp.measure.outputs import IGNORED_LABEL


def label_maps(logits_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """The likeliest class of every pixel: coarse logits are interpolated first.

    Args:
        logits_BChw: Raw logits, shape (B, C, h, w), float, at most 255 classes.
        size: Height and width of the maps, in pixels.
    Returns:
        Labels, shape (B, H, W), uint8.
    Raises:
        ShapeError: If the logits have other axes, or there are more classes.
    """
    if logits_BChw.ndim != 4 or logits_BChw.shape[1] > IGNORED_LABEL:
        raise ShapeError(
            "Expected dense logits of shape (B, C, H, W) with at most 255 classes. "
            f"Got {tuple(logits_BChw.shape)}."
        )
    return at_size(logits_BChw, size).argmax(1).byte()


def maps_of(logits_BChw: Numbers, size: tuple[int, int]) -> Tensor:
    """:func:`label_maps` of tensors or arrays."""
    return label_maps(torch.as_tensor(logits_BChw), size)


def at_size(logits_BChw: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits of every pixel, interpolated linearly between cells."""
    if logits_BChw.shape[-2:] == size:
        return logits_BChw
    return interpolate(logits_BChw, size, mode="bilinear", align_corners=False)


def confusion_matrices(predicted_BHW: Tensor, labels_BHW: Tensor, *, num_classes: int) -> Tensor:
    """Count each image's pixels by true and predicted class; ignored pixels are left out."""
    if predicted_BHW.shape != labels_BHW.shape or labels_BHW.ndim != 3:
        raise ShapeError(
            "Expected predicted and true classes of one shape (B, H, W). "
            f"Got {tuple(predicted_BHW.shape)} and {tuple(labels_BHW.shape)}."
        )
    is_known_BHW = labels_BHW != IGNORED_LABEL
    for name, classes_N in (("labels", labels_BHW[is_known_BHW]), ("predictions", predicted_BHW)):
        if classes_N.numel() and not 0 <= classes_N.min() <= classes_N.max() < num_classes:
            raise DataError(
                f"Expected {name} in [0, {num_classes - 1}], or {IGNORED_LABEL} for pixels whose "
                f"class nobody knows. Got some from {int(classes_N.min())} to "
                f"{int(classes_N.max())}."
            )
    cells = num_classes**2
    image_BHW = torch.arange(len(labels_BHW), device=labels_BHW.device)[:, None, None]
    cell_BHW = (image_BHW * num_classes + labels_BHW.long()) * num_classes + predicted_BHW.long()
    counts = torch.bincount(cell_BHW[is_known_BHW], minlength=len(labels_BHW) * cells)
    return counts.reshape(-1, num_classes, num_classes)


def class_ious(confusion_CC: Tensor) -> Tensor:
    """Intersection over union of each class."""
    counts = confusion_CC.double()
    both = counts.diagonal(dim1=-2, dim2=-1)
    return both / (counts.sum(-1) + counts.sum(-2) - both)


def mean_iou(confusion_CC: Tensor) -> Tensor:
    """Mean intersection over union of the classes that are there or predicted.

    It is no mean of numbers per image: matrices of images are to be summed first.

    Args:
        confusion_CC: Pixels by true and predicted class, shape (..., C, C).
    Returns:
        Shape (...), float64, in [0, 1].
    Example:
        >>> import torch
        >>> mean_iou(torch.tensor([[3, 1], [0, 4]])).item()
        0.775
    """
    return class_ious(confusion_CC).nanmean(-1)


def pixel_accuracy(confusion_CC: Tensor) -> Tensor:
    """Share of right pixels."""
    counts = confusion_CC.double()
    return counts.diagonal(dim1=-2, dim2=-1).sum(-1) / counts.sum((-2, -1)).clamp(min=1)


def labels_of_cells(labels_BHW: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """The labels in the middle of each cell of a coarser grid."""
    nearest = interpolate(labels_BHW[:, None].float(), tuple(size), mode="nearest-exact")
    return nearest[:, 0].to(labels_BHW.dtype)
