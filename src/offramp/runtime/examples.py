"""Made-up inputs of a bundle, where any values do: to warm up, to time, to see shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.runtime.bundle import Bundle

Array = npt.NDArray[Any]

_TOKENS = 8
_CELLS = 8


def example_inputs(bundle: Bundle) -> list[Array]:
    """One sample of ones: any value would do, but ids and masks of 0 could mean padding."""
    multiple = bundle.pixel_multiple
    size = _TOKENS if multiple is None else multiple * _CELLS
    is_padding = bundle.padding is not None and bundle.padding.pad_id == 1
    return [
        np.full((1, *(size if n is None else n for n in spec.sample_shape)), 1 + is_padding).astype(
            spec.dtype
        )
        for spec in bundle.inputs
    ]
