"""Random changes of brightness, contrast and saturation.

Shapes: ``B`` batch, ``C`` channels, ``H W`` pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recoloured(images_BCHW: Tensor, strength: float) -> Tensor:
    """Change the colours of each image at random, drawing from torch's global generator."""
    drawn = torch.rand(3, len(images_BCHW), 1, 1, 1, device=images_BCHW.device)
    brightness, contrast, saturation = (2 * drawn - 1) * strength
    grey = images_BCHW.mean(1, keepdim=True)
    middle = grey.mean((2, 3), keepdim=True)
    vivid = grey + (1 + saturation) * (images_BCHW - grey)
    changed: Tensor = middle + (1 + contrast) * (vivid - middle) + brightness
    return changed
