import math

import pytest
import torch
import torch.nn.functional as F

from offramp import FitConfig, fit
from offramp.data.images import Normalisation, RandomWarp, make_loader, split_off_calibration
from offramp.data.masks import MaskBatches, warped_masks
from offramp.errors import DataError, InvalidArgumentError
from offramp.measure.dense import confusion_matrices, label_maps, mean_iou
from offramp.measure.outputs import IGNORED_LABEL
from offramp.training.tasks.maps import MEAN_IOU_METRIC, DenseTask, one_pixel_a_cell
from offramp.zoo.convnet import convnet
from offramp.zoo.segmentation import segmentation

CLASSES = 3


@pytest.fixture
def network():
    return segmentation(num_classes=CLASSES, widths=(4, 6), stages=2, head_width=4)


@pytest.fixture
def batches():
    """Scenes whose class is told by brightness, a border of pixels without one."""
    masks = torch.randint(CLASSES, (12, 2, 2)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = (masks * 100)[:, None].expand(-1, 3, -1, -1).to(torch.uint8)
    masks[:, :2] = IGNORED_LABEL
    return MaskBatches(
        images, masks.to(torch.uint8), normalise=Normalisation(mean=0.4, deviation=0.3)
    )


def test_a_batch_is_normalised_images_and_masks(batches):
    images, masks = batches.__getitems__([0, 5])
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.float32
    assert masks.dtype == torch.int64
    assert torch.equal(masks, batches.labels_N[[0, 5]].long())


def test_calibration_data_is_cut_without_regard_to_classes(batches):
    train, calibration = split_off_calibration(batches, share=0.25, seed=0, uniform_prior=False)
    assert (len(train), len(calibration)) == (9, 3)
    assert calibration.augment is None


def test_masks_are_warped_as_images_are(batches):
    augment = RandomWarp(degrees=0, scale=0.3, shear=0, shift=3, mirror=True)
    grid = augment.grid(torch.zeros(12, 3, 16, 16))
    warped = warped_masks(batches.labels_N, grid)
    as_images = F.grid_sample(
        batches.labels_N[:, None].float(), grid, mode="nearest", align_corners=False
    )[:, 0]
    is_outside = (grid.abs() > 1).any(-1)
    is_inside = (grid.abs() < 1 - 1 / 16).all(-1)
    assert torch.equal(warped[is_inside].float(), as_images[is_inside])
    assert (warped[is_outside & (grid.abs() > 1 + 1 / 16).any(-1)] == IGNORED_LABEL).all()


def test_colours_change_images_and_not_masks(batches):
    still = RandomWarp(degrees=0, scale=0, shear=0, shift=0, colour=0.3)
    coloured = MaskBatches(
        batches.store, batches.labels_N, normalise=batches.normalise, augment=still
    )
    images, masks = coloured.__getitems__([1, 2])
    plain, plain_masks = batches.__getitems__([1, 2])
    assert not torch.allclose(images, plain, atol=0.01)
    assert torch.equal(masks, plain_masks)


def test_each_pixel_of_a_cell_is_drawn_as_often():
    labels = torch.arange(16).reshape(1, 4, 4)
    drawn = torch.stack([one_pixel_a_cell(labels, torch.Size((2, 2))) for _ in range(400)])
    counts = torch.bincount(drawn.flatten(), minlength=16)
    assert (counts > 60).all()


def test_loss_leaves_ignored_pixels_out(network, batches):
    config = FitConfig(loss_weights=(0.5, 1.0), class_weights=(1.0, 2.0, 0.5), distillation=0.3)
    task = DenseTask(network.eval(), config)
    images, masks = batches.__getitems__([0, 1, 2])
    torch.manual_seed(3)
    loss = task.loss((images,), masks)
    torch.manual_seed(3)
    labels = one_pixel_a_cell(masks, torch.Size((8, 8)))
    known = labels != IGNORED_LABEL
    first, last = (output.movedim(1, -1)[known] for output in network(images))
    weights = torch.tensor(config.class_weights)
    cross = [F.cross_entropy(o, labels[known], weight=weights) for o in (first, last)]
    log_first, log_last = first.log_softmax(-1), last.log_softmax(-1)
    divergence = (log_last.exp() * (log_last - log_first)).sum(-1).mean()
    expected = 0.5 * (0.7 * cross[0] + 0.3 * divergence) + cross[1]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_of_which_no_known_pixel_is_drawn_teaches_nothing(network):
    task = DenseTask(network.eval(), FitConfig(distillation=0.5))
    masks = torch.full((1, 16, 16), IGNORED_LABEL)
    masks[0, 0, 0] = 1
    losses = {task.loss((torch.randn(1, 3, 16, 16),), masks).item() for _ in range(20)}
    assert 0 in losses
    assert all(math.isfinite(loss) for loss in losses)


def test_fit_learns_and_reports_the_mean_iou_of_each_exit(network, batches):
    logged = {}

    class Listen(__import__("lightning").pytorch.Callback):
        def on_train_epoch_end(self, trainer, module):
            logged.update(trainer.callback_metrics)

    config = FitConfig(epochs=40, batch_size=4, learning_rate=0.01, device="cpu")
    fit(network, batches, batches, config, callbacks=[Listen()])
    images, masks = batches.__getitems__(list(range(12)))
    for k, output in enumerate(network(images)):
        counts = confusion_matrices(label_maps(output, (16, 16)), masks, num_classes=CLASSES)
        found = mean_iou(counts.sum(0)).item()
        assert found > 0.6
        assert float(logged[MEAN_IOU_METRIC.format(k)]) == pytest.approx(found, abs=1e-4)


def test_masks_without_a_class_or_with_an_unknown_one_are_refused(network):
    task = DenseTask(network, FitConfig())
    with pytest.raises(DataError, match="a class somewhere"):
        task.loss((torch.zeros(1, 3, 16, 16),), torch.full((1, 16, 16), IGNORED_LABEL))
    with pytest.raises(DataError, match=r"Labels must be in \[0, 2\]"):
        task.loss((torch.zeros(1, 3, 16, 16),), torch.full((1, 16, 16), 7))


def test_class_weights_are_for_dense_networks():
    stages = ((("conv", 4, 2),),)
    other = convnet(in_channels=1, side=8, stages=stages, num_classes=3)
    data = torch.utils.data.TensorDataset(torch.zeros(2, 1, 8, 8), torch.zeros(2).long())
    with pytest.raises(InvalidArgumentError, match="'class_weights' parameter is about"):
        fit(other, data, config=FitConfig(class_weights=(1.0, 1.0, 1.0)))
    for weight in (math.inf, 0.0):  # a batch of nothing but that class would have no loss
        with pytest.raises(InvalidArgumentError, match="must be positive numbers"):
            FitConfig(class_weights=(weight,))


def test_there_is_one_class_weight_for_each_class(network):
    task = DenseTask(network, FitConfig(class_weights=(1.0, 2.0)))
    with pytest.raises(InvalidArgumentError, match="must hold 3 numbers, one per class"):
        task.loss((torch.zeros(1, 3, 16, 16),), torch.zeros(1, 16, 16).long())


def test_a_loader_yields_whole_batches(batches):
    images, masks = next(iter(make_loader(batches, batch_size=5)))
    assert (len(images), len(masks)) == (5, 5)
