"""Answers of any engine, in batches of some size."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from offramp.model.multi_exit import Features, as_features
from offramp.results import AdaptiveResult


class Runner(Protocol):
    """Answers a batch, spending on each sample what it needs; any engine may do so."""

    def run(self, *inputs: Any) -> AdaptiveResult[Any]:
        """Answer a batch of inputs, each with its batch axis first."""
        ...


def answer_in_batches(
    runner: Runner, samples: Tensor | Features, *, batch_size: int
) -> AdaptiveResult[Tensor]:
    """Answer samples in batches of some size; one sample is computed in other ways than several."""
    parts = [torch.split(tensor, batch_size) for tensor in as_features(samples)]
    results = [runner.run(*batch) for batch in zip(*parts, strict=True)]

    def joined(name: str) -> Tensor:
        return torch.cat([torch.as_tensor(getattr(result, name)) for result in results])

    return AdaptiveResult(
        output=joined("output"),
        exit_index=joined("exit_index"),
        confidence=joined("confidence"),
        macs=joined("macs"),
        blocks=None if results[0].blocks is None else joined("blocks"),
        tokens=None if results[0].tokens is None else joined("tokens"),
    )
