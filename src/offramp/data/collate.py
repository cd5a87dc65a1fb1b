"""Samples put together to a batch, as torch does it, but for what cannot be stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import default_collate

from offramp.errors import DataError


def collate(samples: Sequence[Any]) -> Any:
    """Put samples together to a batch.

    Parts that cannot be stacked (images of several sizes, None, PIL images) stay lists: whoever
    reads the batch says what is wrong with those that it needs.
    """
    first = samples[0]
    if isinstance(first, Mapping):
        for sample in samples:
            if not isinstance(sample, Mapping) or first.keys() - sample.keys():
                raise DataError(
                    f"Expected samples with the keys {', '.join(map(repr, first))}. Got "
                    f"{', '.join(map(repr, sample)) or 'none'}."
                )
        return {key: collate([sample[key] for sample in samples]) for key in first}
    if isinstance(first, tuple) or (isinstance(first, list) and _holds_parts(first)):
        lengths = {len(sample) for sample in samples if isinstance(sample, tuple | list)}
        if lengths != {len(first)}:
            raise DataError(
                f"Expected samples of {len(first)} parts, as the first. Got {sorted(lengths)}."
            )
        parts = [collate(part) for part in zip(*samples, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    try:
        return list(samples) if isinstance(first, list) else default_collate(list(samples))
    except (TypeError, RuntimeError):
        return list(samples)


def _holds_parts(sample: Sequence[Any]) -> bool:
    """Tell if a list is a sample of several parts; one of numbers alone is a part itself."""
    if all(isinstance(value, list) for value in sample):
        return any(map(_holds_parts, sample))
    return not all(isinstance(value, int | float) for value in sample)
