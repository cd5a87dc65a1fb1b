import math

import pytest
import torch

from offramp.data.images import (
    EpochSampler,
    ImageBatches,
    Normalisation,
    RandomWarp,
    epoch_seed,
    make_loader,
    split_off_calibration,
)
from offramp.errors import InvalidArgumentError

HALVES = Normalisation(mean=0.5, deviation=0.5)


def images_with(labels, **options) -> ImageBatches:
    """Image n is filled with the value n, so that it can be told from the others."""
    labels_N = torch.as_tensor(labels)
    store = torch.arange(len(labels_N), dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 2, 3)
    return ImageBatches(store, labels_N, normalise=HALVES, **options)


def rows_of(dataset: ImageBatches) -> list[int]:
    images, _ = dataset.__getitems__(range(len(dataset)))
    return ((images[:, 0, 0, 0] + 1) * 255 / 2).round().int().tolist()


# Normalisation, ImageBatches, make_loader


def test_normalisation_by_hand():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(HALVES(pixels), torch.tensor([-1.0, -0.6, 1.0]))
    torch.testing.assert_close(
        Normalisation(mean=0.2, deviation=0.1)(pixels), torch.tensor([-2.0, 0.0, 8.0])
    )


def test_normalisation_leaves_its_input_alone():
    pixels = torch.tensor([0.0, 51.0])
    HALVES(pixels)
    assert pixels.tolist() == [0.0, 51.0]


def test_batch_equals_its_single_items():
    dataset = images_with([3, 1, 2, 0])
    images, labels = dataset.__getitems__([2, 0, 2])
    assert images.shape == (3, 1, 2, 3)
    assert images.dtype == torch.float32
    assert labels.tolist() == [2, 3, 2]
    for position, index in enumerate([2, 0, 2]):
        image, label = dataset[index]
        assert torch.equal(image, images[position])
        assert label == labels[position]


def test_subset_keeps_the_order_asked_for_and_nests():
    dataset = images_with([5, 6, 7, 8])
    part = dataset.subset(torch.tensor([3, 1, 0]))
    assert len(part) == 3
    assert (rows_of(part), part.labels_N.tolist()) == ([3, 1, 0], [8, 6, 5])
    nested = part.subset(torch.tensor([2, 0]))
    assert (rows_of(nested), nested.labels_N.tolist()) == ([0, 3], [5, 8])
    assert nested.store is dataset.store


def test_augmentation_sees_normalised_batches_and_goes_with_subsets():
    dataset = images_with([0, 1]).augmented(lambda images: images + 10)
    assert dataset[0][0].min() == dataset[0][0].max() == 9
    assert dataset.subset(torch.tensor([0]))[0][0].max() == 9
    assert dataset.augmented(None)[0][0].max() == -1


def test_loader_yields_whole_batches_and_the_rest():
    batches = list(make_loader(images_with(range(5)), batch_size=2))
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [2, 3], [4]]
    assert batches[0][0].shape == (2, 1, 2, 3)


def test_loader_takes_any_data_set_and_sampler():
    pairs = [(torch.tensor([float(n)]), n) for n in range(3)]
    ((inputs, labels),) = make_loader(pairs, batch_size=3, sampler=[2, 0, 1])
    assert inputs.tolist() == [[2.0], [0.0], [1.0]]
    assert labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one_is_refused(batch_size):
    with pytest.raises(InvalidArgumentError, match=f"at least 1. Got {batch_size}"):
        make_loader(images_with([0]), batch_size=batch_size)


# EpochSampler


def test_sampler_visits_everyone_once_in_an_order_that_seed_and_epoch_repeat():
    def order(*, seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(torch.zeros(50, dtype=torch.int64), seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(seed=1, epoch=2)
    assert sorted(first) == list(range(50))
    assert order(seed=1, epoch=2) == first
    assert first not in (order(seed=1, epoch=3), order(seed=2, epoch=2), list(range(50)))


def test_sampler_does_not_depend_on_the_global_generator():
    sampler = EpochSampler(torch.zeros(50, dtype=torch.int64), seed=0)
    first = list(sampler)
    torch.manual_seed(123)
    assert list(sampler) == first


def test_class_balance_evens_out_a_rare_class():
    labels = torch.tensor([0] * 900 + [2] * 100)  # class 1 has no sample
    sampler = EpochSampler(labels, seed=0, class_balanced=True)
    drawn = labels[list(sampler)]
    assert len(drawn) == len(sampler) == 1000
    # 1,000 fair draws: mean 500, standard deviation 16.
    assert abs(int((drawn == 2).sum()) - 500) < 5 * 16


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_an_epoch(monkeypatch, world_size):
    drawn = []
    for rank in range(world_size):
        monkeypatch.setattr(
            "offramp.data.images._rank_and_world_size", lambda rank=rank: (rank, world_size)
        )
        sampler = EpochSampler(torch.zeros(10, dtype=torch.int64), seed=0)
        share = list(sampler)
        assert len(share) == len(sampler) == math.ceil(10 / world_size)
        drawn += share
    assert set(drawn) == set(range(10))


def test_epoch_seeds_of_neighbouring_runs_differ():
    seeds = {epoch_seed(seed, epoch) for seed in range(20) for epoch in range(100)}
    assert len(seeds) == 2000
    assert min(seeds) >= 0


# RandomWarp


def test_jitter_with_zero_limits_is_the_identity():
    images = torch.randn(3, 2, 6, 5)
    still = RandomWarp(degrees=0, scale=0, shear=0, shift=0)
    torch.testing.assert_close(still(images), images, atol=1e-5, rtol=1e-5)


def test_jitter_moves_each_image_its_own_way_and_a_seed_repeats_it():
    images = torch.randn(1, 1, 8, 8).repeat(4, 1, 1, 1)
    torch.manual_seed(5)
    moved = RandomWarp()(images)
    assert len({tuple(image.flatten().tolist()) for image in moved}) == 4
    torch.manual_seed(5)
    assert torch.equal(RandomWarp()(images), moved)


def test_shift_moves_at_most_as_many_pixels_as_asked():
    images = torch.zeros(200, 1, 11, 21)
    images[..., 5, 10] = 1
    moved = RandomWarp(degrees=0, scale=0, shear=0, shift=2)(images)
    torch.testing.assert_close(moved.sum((1, 2, 3)), torch.ones(200), atol=1e-3, rtol=0)
    reached = moved[:, 0].amax(0) > 1e-3
    rows, columns = reached.any(1).nonzero()[:, 0], reached.any(0).nonzero()[:, 0]
    assert (int(rows.min()), int(rows.max())) == (3, 7)
    assert (int(columns.min()), int(columns.max())) == (8, 12)


def test_rotation_of_a_square_keeps_the_distance_from_the_middle():
    images = torch.zeros(100, 1, 31, 31)
    images[..., 15, 25] = 1  # ten pixels right of the middle
    moved = RandomWarp(degrees=30, scale=0, shear=0, shift=0)(images)
    offset = torch.arange(31) - 15.0
    mass = moved.sum((1, 2, 3))
    y = (moved.sum((1, 3)) * offset).sum(1) / mass
    x = (moved.sum((1, 2)) * offset).sum(1) / mass
    torch.testing.assert_close(x.hypot(y), torch.full((100,), 10.0), atol=0.15, rtol=0)
    angles = torch.rad2deg(torch.atan2(y, x))
    assert 25 < angles.max() < 31
    assert -31 < angles.min() < -25


def test_elastic_displacement_is_smooth_and_of_the_size_asked_for():
    ramp = torch.arange(64.0).expand(200, 1, 64, 64)  # each pixel says which column it is
    moved = RandomWarp(degrees=0, scale=0, shear=0, shift=0, elastic=2.0)(ramp)
    displacement = (moved - ramp)[:, 0, 16:48, 16:48]
    assert 1.2 < displacement.std() < 2.5
    assert displacement.diff(dim=2).abs().mean() < 0.3
    assert displacement.mean((1, 2)).std() > 0.5  # every image has its own
    still = RandomWarp(degrees=0, scale=0, shear=0, shift=0, elastic=0.0)(ramp)
    torch.testing.assert_close(still, ramp, atol=1e-3, rtol=0)


def test_half_of_the_images_are_mirrored():
    images = torch.rand(400, 3, 6, 6)
    moved = RandomWarp(degrees=0, scale=0, shear=0, shift=0, mirror=True)(images)
    kept = (moved - images).abs().amax((1, 2, 3)) < 1e-5
    swapped = (moved - images.flip(-1)).abs().amax((1, 2, 3)) < 1e-5
    assert (kept ^ swapped).all()
    assert 140 < int(swapped.sum()) < 260


# split_off_calibration


def split(labels, **options) -> tuple[ImageBatches, ImageBatches]:
    settings = {"share": 0.2, "seed": 0, "uniform_prior": False} | options
    return split_off_calibration(images_with(labels), **settings)


UNBALANCED = [0, 1, 1, 1] * 30  # 30 of class 0, 90 of class 1


def test_calibration_and_train_are_disjoint_and_together_whole():
    train, calibration = split(UNBALANCED)
    assert sorted(rows_of(train) + rows_of(calibration)) == list(range(120))
    for part in (train, calibration):
        assert part.labels_N.tolist() == [UNBALANCED[row] for row in rows_of(part)]


@pytest.mark.parametrize(("uniform_prior", "counts"), [(False, [6, 18]), (True, [12, 12])])
def test_calibration_has_the_declared_prior(uniform_prior, counts):
    _, calibration = split(UNBALANCED, uniform_prior=uniform_prior)
    assert torch.bincount(calibration.labels_N).tolist() == counts


def test_uniform_prior_skips_classes_without_samples():
    _, calibration = split([0, 2] * 10, uniform_prior=True)
    assert torch.bincount(calibration.labels_N).tolist() == [2, 0, 2]


def test_the_cut_repeats_with_its_seed():
    first = rows_of(split(UNBALANCED)[1])
    assert rows_of(split(UNBALANCED)[1]) == first
    assert rows_of(split(UNBALANCED, seed=1)[1]) != first


def test_only_training_images_are_augmented():
    dataset = images_with(UNBALANCED).augmented(lambda images: images + 10)
    train, calibration = split_off_calibration(dataset, share=0.2, seed=0, uniform_prior=False)
    assert train[0][0].min() >= 9
    assert calibration[0][0].max() <= 1


@pytest.mark.parametrize("share", [0.0, -0.1, 0.6, math.nan])
def test_share_out_of_range_is_refused(share):
    with pytest.raises(InvalidArgumentError, match=r"in \(0, 0\.5\]"):
        split(UNBALANCED, share=share)


def test_half_can_be_set_aside_of_odd_classes_too():
    train, calibration = split([0] * 7 + [1] * 3, share=0.5)
    assert abs(len(train) - len(calibration)) <= 2


def test_class_with_too_few_samples_for_a_uniform_prior_is_named():
    # Each of two classes would give 0.2 * 106 / 2 = 11 samples, class 1 has six.
    with pytest.raises(InvalidArgumentError, match="Class 1 has 6 samples, too few to set 11"):
        split([0] * 100 + [1] * 6, uniform_prior=True)
