import numpy as np
import pytest
import torch

from offramp import label_maps, mean_iou
from offramp.errors import DataError, ShapeError
from offramp.measure.dense import (
    IGNORED_LABEL,
    class_ious,
    confusion_matrices,
    labels_of_cells,
    pixel_accuracy,
)
from offramp.runtime.dense import label_maps as numpy_label_maps


def mean_iou_by_sets(predicted, labels, num_classes):
    """Intersection over union, pixel by pixel, ignored pixels left out."""
    ious = []
    for c in range(num_classes):
        both = either = 0
        for p, t in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True):
            if t == IGNORED_LABEL:
                continue
            both += p == c and t == c
            either += p == c or t == c
        if either:
            ious.append(both / either)
    return sum(ious) / len(ious)


@pytest.fixture
def masks():
    predicted = torch.randint(4, (3, 6, 5))
    labels = torch.randint(4, (3, 6, 5))
    labels[torch.rand(3, 6, 5) < 0.3] = IGNORED_LABEL
    return predicted.to(torch.uint8), labels.to(torch.uint8)


def test_mean_iou_equals_that_of_sets_of_pixels(masks):
    predicted, labels = masks
    counts = confusion_matrices(predicted, labels, num_classes=4)
    expected = mean_iou_by_sets(predicted, labels, 4)
    assert mean_iou(counts.sum(0)).item() == pytest.approx(expected, abs=1e-12)


def test_mean_iou_is_no_mean_over_images(masks):
    counts = confusion_matrices(*masks, num_classes=4)
    assert mean_iou(counts.sum(0)).item() != pytest.approx(mean_iou(counts).mean().item())


def test_confusion_counts_each_image_by_true_class_then_predicted():
    predicted = torch.tensor([[[0, 1, 1]], [[0, 0, 0]]])
    labels = torch.tensor([[[0, 0, 1]], [[1, IGNORED_LABEL, 0]]])
    counts = confusion_matrices(predicted, labels, num_classes=2)
    assert counts.tolist() == [[[1, 1], [0, 1]], [[1, 0], [1, 0]]]
    assert pixel_accuracy(counts).tolist() == pytest.approx([2 / 3, 1 / 2])


def test_a_class_that_is_neither_there_nor_predicted_does_not_count():
    counts = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert class_ious(counts).tolist() == pytest.approx([0.75, 0.8, float("nan")], nan_ok=True)
    assert mean_iou(counts).item() == pytest.approx(0.775)


def test_images_without_a_known_pixel_have_no_right_one():
    assert pixel_accuracy(torch.zeros(2, 2)).item() == 0


def test_confusion_refuses_other_shapes(masks):
    with pytest.raises(ShapeError, match=r"of one shape \(B, H, W\)"):
        confusion_matrices(masks[0][:1], masks[1], num_classes=4)


@pytest.mark.parametrize("label", [-1, -100, 11])
def test_confusion_refuses_labels_that_are_no_class(label):
    """They would be counted in another image's matrix."""
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    labels[0, 0, 0] = label
    with pytest.raises(DataError, match=r"labels in \[0, 10\], or 255"):
        confusion_matrices(torch.zeros_like(labels), labels, num_classes=11)
    with pytest.raises(DataError, match="predictions"):
        confusion_matrices(labels, torch.zeros_like(labels), num_classes=11)


def test_label_maps_interpolate_logits_not_labels():
    # Between a cell of class 0 by 3 and one of class 1 by 1, the change is nearer to class 1.
    logits = torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]]])
    assert label_maps(logits, (1, 8)).tolist() == [[[0, 0, 0, 0, 0, 1, 1, 1]]]
    assert label_maps(logits, (1, 8)).dtype == torch.uint8


@pytest.mark.parametrize("size", [(12, 20), (7, 9), (5, 6), (3, 2)])
def test_numpy_makes_the_label_maps_that_torch_makes(size):
    logits = torch.randn(2, 5, 5, 6)
    found = numpy_label_maps(logits.numpy(), size)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, label_maps(logits, size).numpy())


@pytest.mark.parametrize("make", [label_maps, lambda x, size: numpy_label_maps(x.numpy(), size)])
def test_label_maps_refuse_logits_of_whole_samples(make):
    with pytest.raises(ShapeError, match=r"\(B, C, H, W\)"):
        make(torch.zeros(2, 3), (4, 4))
    with pytest.raises(ShapeError, match="at most 255 classes"):
        make(torch.zeros(1, 256, 2, 2), (4, 4))


def test_labels_of_cells_are_those_in_their_middle():
    labels = torch.arange(36).reshape(1, 6, 6).to(torch.uint8)
    assert labels_of_cells(labels, (2, 2)).tolist() == [[[7, 10], [25, 28]]]
