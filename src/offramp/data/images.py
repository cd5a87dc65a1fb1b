"""Batches of images: one uint8 store indexed by batch, drawn in an order that a seed repeats.

Shapes: ``N`` samples, ``B`` batch, ``C`` channels, ``H W`` pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from offramp.data.arrays import ArrayBatches, hashed
from offramp.data.collate import collate
from offramp.data.colour import recoloured
from offramp.data.preprocessing import scaled
from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from typing_extensions import Self


class ImageStore(Protocol):
    """Whatever holds the pixels: a uint8 tensor, or a file that decodes what is asked for."""

    def __getitem__(self, rows_B: Tensor) -> Tensor:
        """Pixels of the given rows, shape (B, C, H, W), uint8."""
        ...


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Pixel normalisation: ``(pixel / 255 - mean) / deviation``.

    Attributes:
        mean: Subtracted from pixels in [0, 1].
        deviation: Divides what is left.
    """

    mean: float
    deviation: float

    def __post_init__(self) -> None:
        if not self.deviation > 0:
            raise InvalidArgumentError(
                f"The 'deviation' parameter must be positive. Got {self.deviation}."
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Turn uint8 pixels of any shape into normalised float32."""
        pixels = images.numpy()
        return torch.from_numpy(scaled(pixels, mean=(self.mean,), deviation=(self.deviation,)))


class Batches(Dataset[tuple[Tensor, Tensor]], ABC):
    """Labelled samples, fetched a batch at a time.

    A ``DataLoader`` that finds ``__getitems__`` asks for a whole batch at once, so that a batch
    need not cost a Python call per sample. Use :func:`make_loader`.

    Attributes:
        labels_N: Class of each sample, shape (N,), int64.
        rows_N: Rows of what holds the samples, in order, shape (N,), int64.
    """

    labels_N: Tensor
    rows_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, labels = self.__getitems__([index])
        return inputs[0], labels[0]

    @property
    def run_batch_size(self) -> int:
        """Samples to run at a time where nothing is trained: so many fit in memory."""
        return 256

    @property
    def strata_N(self) -> Tensor:
        """By what calibration data is drawn evenly, shape (N,), int64: the classes."""
        return self.labels_N

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fetch a batch of inputs and labels."""

    @abstractmethod
    def subset(self, index_B: Tensor) -> Self:
        """The same samples, fewer of them, in the order of the positions given."""

    @abstractmethod
    def unaugmented(self) -> Self:
        """The same samples as they are."""

    @abstractmethod
    def hashes(self) -> npt.NDArray[np.uint64]:
        """Tell the samples apart by what a network sees of them, shape (N,)."""


AnyBatches = TypeVar("AnyBatches", bound=Batches)


class TensorBatches(Batches):
    """Arrays as tensors: what a network is trained on."""

    def __init__(self, arrays: ArrayBatches, rows_N: Tensor | None = None) -> None:
        self.arrays = arrays
        self.rows_N = torch.arange(len(arrays)) if rows_N is None else rows_N
        self.labels_N = torch.from_numpy(arrays.labels_N)[self.rows_N]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Any, Tensor]:
        """Fetch a batch."""
        inputs, labels_B = self.arrays.__getitems__(self.rows_N[list(indices)].tolist())
        if isinstance(inputs, tuple):
            return tuple(map(torch.from_numpy, inputs)), torch.from_numpy(labels_B)
        return torch.from_numpy(inputs), torch.from_numpy(labels_B)

    def subset(self, index_B: Tensor) -> TensorBatches:
        """The same samples, fewer of them."""
        return TensorBatches(self.arrays, self.rows_N[index_B])

    def unaugmented(self) -> TensorBatches:
        """Arrays are never augmented: the same."""
        return self

    def hashes(self) -> npt.NDArray[np.uint64]:
        """Hash what a network sees of the samples."""
        hashes_N: npt.NDArray[np.uint64] = self.arrays.hashes()[self.rows_N.numpy()]
        return hashes_N


def in_tensors(batches: Batches | ArrayBatches) -> Batches:
    """Samples as a network in torch takes them."""
    return TensorBatches(batches) if isinstance(batches, ArrayBatches) else batches


class ImageBatches(Batches):
    """Labelled images, decoded and normalised: a batch costs one indexing operation."""

    def __init__(
        self,
        store: ImageStore,
        labels_N: Tensor,
        *,
        normalise: Callable[[Tensor], Tensor],
        augment: Callable[[Tensor], Tensor] | None = None,
        rows_N: Tensor | None = None,
    ) -> None:
        self.store = store
        self.labels_N = labels_N
        self.normalise = normalise
        self.augment = augment
        self.rows_N = torch.arange(len(labels_N)) if rows_N is None else rows_N

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fetch a batch."""
        index_B = torch.as_tensor(indices)
        images = self.normalise(self.store[self.rows_N[index_B]])
        if self.augment is not None:
            images = self.augment(images)
        return images, self.labels_N[index_B]

    def subset(self, index_B: Tensor) -> Self:
        """The same images, fewer of them; the store is shared."""
        return type(self)(
            self.store,
            self.labels_N[index_B],
            normalise=self.normalise,
            augment=self.augment,
            rows_N=self.rows_N[index_B],
        )

    def hashes(self) -> npt.NDArray[np.uint64]:
        """Hash the pixels, as they are before they are normalised."""
        chunks = torch.split(self.rows_N, self.run_batch_size)
        return hashed(one.numpy().tobytes() for rows in chunks for one in self.store[rows])

    def unaugmented(self) -> Self:
        """The same images without augmentation."""
        return self.augmented(None)

    def augmented(self, augment: Callable[[Tensor], Tensor] | None) -> Self:
        """The same images with another augmentation."""
        return type(self)(
            self.store,
            self.labels_N,
            normalise=self.normalise,
            augment=augment,
            rows_N=self.rows_N,
        )


class EpochSampler(Sampler[int]):
    """Shuffled indices that depend on the seed and the epoch only.

    Starting an epoch also seeds torch's global generator from them. A run that is resumed at
    epoch e therefore sees the batches that the unbroken run saw. Over several processes each
    draws its own share of the same order.
    """

    def __init__(self, labels_N: Tensor, *, seed: int, class_balanced: bool = False) -> None:
        self.seed = seed
        self.epoch = 0
        self.num_samples = len(labels_N)
        self.weights_N = 1 / torch.bincount(labels_N)[labels_N].double() if class_balanced else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        _, world_size = _rank_and_world_size()
        return math.ceil(self.num_samples / world_size)

    def __iter__(self) -> Iterator[int]:
        rank, world_size = _rank_and_world_size()
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        # Augmentation and dropout draw from the global generator. It is seeded here because
        # Lightning leaves its epoch-start hooks out when it resumes.
        torch.manual_seed(epoch_seed(self.seed, self.epoch) + rank)
        if self.weights_N is None:
            order = torch.randperm(self.num_samples, generator=generator)
        else:
            order = torch.multinomial(
                self.weights_N, self.num_samples, replacement=True, generator=generator
            )
        share = torch.cat([order, order[: -len(order) % world_size]])[rank::world_size]
        return iter(share.tolist())


@dataclass(frozen=True, kw_only=True)
class RandomWarp:
    """Augmentation of normalised images: a random affine map, and a smooth distortion, per image.

    Attributes:
        degrees: Largest rotation, either way.
        scale: Largest relative change of size, either way.
        shear: Largest horizontal shear, either way.
        shift: Largest shift in pixels, either way, along each axis.
        elastic: Standard deviation in pixels of a smooth random displacement, which is drawn at
            5 x 5 points and interpolated between them; 0 for none.
        mirror: Whether to swap left and right of half of the images.
        colour: Largest relative change of contrast and of saturation, either way, and largest
            shift of brightness in deviations of the pixels.
    Reference: Simard et al. (2003), "Best practices for convolutional neural networks applied to
        visual document analysis", section 2, for elastic distortions of handwriting.
    """

    degrees: float = 8.0
    scale: float = 0.08
    shear: float = 0.1
    shift: float = 2.0
    elastic: float = 0.0
    mirror: bool = False
    colour: float = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        """Transform a batch of shape (B, C, H, W); borders repeat outwards."""
        return self.warp(images, self.grid(images))

    def warp(self, images: Tensor, grid_BHW2: Tensor) -> Tensor:
        """Take normalised images (B, C, H, W) at the places that :meth:`grid` drew, recoloured."""
        warped = F.grid_sample(images, grid_BHW2, padding_mode="border", align_corners=False)
        return recoloured(warped, self.colour) if self.colour else warped

    def grid(self, images: Tensor) -> Tensor:
        """Draw the places of the pixels of images (B, C, H, W), as ``F.grid_sample`` has them."""

        def uniform(limit: float) -> Tensor:
            return (torch.rand(len(images), device=images.device) * 2 - 1) * limit

        angle = uniform(math.radians(self.degrees))
        size = 1 + uniform(self.scale)
        height, width = images.shape[-2:]
        cos, sin = angle.cos() * size, angle.sin() * size
        top = torch.stack([cos, uniform(self.shear) - sin, uniform(2 * self.shift / width)], 1)
        bottom = torch.stack([sin, cos, uniform(2 * self.shift / height)], 1)
        grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
        if self.elastic:
            nodes = torch.randn(len(images), 2, 5, 5, device=images.device) * self.elastic
            smooth = F.interpolate(nodes, (height, width), mode="bicubic", align_corners=True)
            grid = grid + smooth.movedim(1, -1) * grid.new_tensor([2 / width, 2 / height])
        if self.mirror:
            grid[torch.rand(len(images), device=images.device) < 0.5, :, :, 0] *= -1
        return grid


def make_loader(
    dataset: Dataset[Any], *, batch_size: int, sampler: Sampler[int] | None = None
) -> DataLoader[Any]:
    """Wrap a data set in a loader; whole batches at a time where the data set can."""
    if batch_size < 1:
        raise InvalidArgumentError(
            f"The 'batch_size' parameter must be an int of at least 1. Got {batch_size}."
        )
    put_together = _as_fetched if isinstance(dataset, Batches | ArrayBatches) else collate
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=put_together)


def split_off_calibration(
    dataset: AnyBatches, *, share: float, seed: int, uniform_prior: bool
) -> tuple[AnyBatches, AnyBatches]:
    """Cut a calibration set from training data; the two are disjoint."""
    if not 0 < share <= 0.5:
        raise InvalidArgumentError(
            f"The 'calibration_share' parameter must be in (0, 0.5]. Got {share}."
        )
    labels_N = dataset.strata_N
    class_counts = torch.bincount(labels_N)
    present = int((class_counts > 0).sum())
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, count in enumerate(class_counts.tolist()):
        if count == 0:
            continue
        wanted = round(share * (len(labels_N) / present if uniform_prior else count))
        if wanted > (count + 1) // 2:
            raise InvalidArgumentError(
                f"Class {label} has {count} samples, too few to set {wanted} aside for "
                f"calibration and train on as many. Use a smaller 'calibration_share' than {share}."
            )
        members = (labels_N == label).nonzero()[:, 0]
        chosen.append(members[torch.randperm(count, generator=generator)[:wanted]])
    chosen_B = torch.cat(chosen).sort().values
    if len(chosen_B) == 0:
        raise InvalidArgumentError(
            f"A 'calibration_share' of {share} sets no sample aside. Use a larger one, or 0."
        )
    kept = torch.ones(len(labels_N), dtype=torch.bool)
    kept[chosen_B] = False
    calibration = dataset.subset(chosen_B).unaugmented()
    return dataset.subset(kept.nonzero()[:, 0]), calibration


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of one epoch's random numbers, so that an epoch can be repeated on its own."""
    return (seed * 1_000_003 + epoch) % 2**63


def _as_fetched(batch: Any) -> Any:
    return batch


def _rank_and_world_size() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
