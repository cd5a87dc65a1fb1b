"""Classes out of whatever stands for the labels of a batch.

Shapes: ``B`` batch, ``C`` classes, ``H W`` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from offramp.errors import DataError
from offramp.measure.outputs import OUTPUTS, Outputs, shape_in_words


def read_labels(
    labels: object,
    *,
    num_samples: int,
    num_classes: int | None = None,
    outputs: Sequence[Outputs] = OUTPUTS,
) -> Tensor:
    """Read the labels of a batch as classes.

    Classes may be whole numbers of any type, bool and float among them; of shape (B,), (B, 1), or
    one-hot, (B, C); of pixels (B, H, W), (B, 1, H, W) or (B, C, H, W). Lists and arrays will do.

    Example:
        >>> read_labels([[0.0, 1.0], [1.0, 0.0]], num_samples=2)
        tensor([1, 0])
    """
    values = _label_tensor(labels)
    if values.layout != torch.strided:
        values = values.to_dense()
    if values.ndim == 0 or values.shape[0] != num_samples:
        raise DataError(
            f"Expected a label for each of the {num_samples} samples of the batch, batch axis "
            f"first. Got labels of shape {tuple(values.shape)}."
        )
    if values.is_complex():
        raise DataError(f"Expected classes as whole numbers. Got labels of {values.dtype}.")
    if not bool(values.isfinite().all()):
        raise DataError("Expected classes as whole numbers. Got labels with NaN or infinity.")
    if values.ndim in (2, 4):
        values = _without_class_axis(values, num_classes)
    if values.ndim not in [len(each.label_axes) for each in outputs]:
        wanted = outputs[0]
        raise DataError(
            f"Expected labels of shape {shape_in_words(wanted.label_axes)}, one for each "
            f"{wanted.one_for_each}. Got shape {tuple(values.shape)}."
        )
    if values.is_floating_point() and not torch.equal(values, values.round()):
        wrong = values[values != values.round()][0].item()
        raise DataError(
            f"Expected classes as whole numbers. Got a label of {wrong:g}: regression, and labels "
            "shared out among classes, are not supported."
        )
    return values.long()


def _without_class_axis(values: Tensor, num_classes: int | None) -> Tensor:
    """Labels of shape (B, 1, ...) or one-hot, (B, C, ...), without the second axis."""
    if values.shape[1] == 1 and num_classes != 1:
        return values[:, 0]
    is_one = values == 1
    is_binary = bool((is_one | (values == 0)).all())
    if is_binary and bool((is_one.sum(1) == 1).all()) and num_classes in (None, values.shape[1]):
        return is_one.int().argmax(1)
    columns = "C" if num_classes is None else num_classes
    raise DataError(
        f"Expected one class for each sample: labels of shape (B,), (B, 1), or one-hot of "
        f"{columns} columns with a single 1. Got shape {tuple(values.shape)}"
        f"{'' if is_binary else ' with other values'}: several classes for a sample, and labels "
        "shared out among classes (mixup), are not supported."
    )


def _label_tensor(labels: object) -> Tensor:
    if isinstance(labels, Tensor):
        return labels
    if isinstance(labels, list | tuple) and labels and isinstance(labels[0], Tensor):
        if len({label.shape for label in labels}) == 1:
            return torch.stack(tuple(labels))
        raise DataError("Expected labels of one shape. Got a list of several.")
    try:
        array = np.asarray(labels)
    except ValueError as error:
        raise DataError("Expected labels of one shape. Got a list of several.") from error
    if array.dtype.kind in "biuf":
        return torch.tensor(array)
    first = array.flat[0] if array.size else labels
    if isinstance(first, str | bytes):
        raise DataError(
            f"Expected classes as whole numbers from 0. Got text such as {first[:20]!r}: number "
            "the class names, as sorted(names).index(name)."
        )
    raise DataError(
        "Expected classes as whole numbers from 0. Got "
        f"{'None: samples without labels' if first is None else type(first).__name__}."
    )
