"""Images with masks: a class for every pixel, or none.

Shapes: ``N`` samples, ``B`` batch, ``C`` channels, ``H W`` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.data.images import ImageBatches, RandomWarp
from offramp.measure.outputs import IGNORED_LABEL


class MaskBatches(ImageBatches):
    """Images with masks, decoded and normalised, fetched a batch at a time."""

    augment: RandomWarp | None

    @property
    def run_batch_size(self) -> int:
        """Few: every exit says something of every pixel."""
        return 8

    @property
    def strata_N(self) -> Tensor:
        """All alike: an image has no class of its own."""
        return torch.zeros(len(self), dtype=torch.int64)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fetch a batch."""
        index_B = torch.as_tensor(indices)
        images = self.normalise(self.store[self.rows_N[index_B]])
        masks = self.labels_N[index_B]
        if self.augment is not None:
            grid = self.augment.grid(images)
            images, masks = self.augment.warp(images, grid), warped_masks(masks, grid)
        return images, masks.long()


def warped_masks(masks_BHW: Tensor, grid_BHW2: Tensor) -> Tensor:
    """Take the nearest pixel of masks at given places, and none beyond the border."""
    # Beyond the border grid_sample gives 0: one more than the class leaves 0 for "none".
    known_B1HW = (masks_BHW[:, None].float() + 1) % (IGNORED_LABEL + 1)
    found_BHW = F.grid_sample(known_B1HW, grid_BHW2, mode="nearest", align_corners=False)[:, 0]
    return ((found_BHW - 1) % (IGNORED_LABEL + 1)).to(torch.uint8)
