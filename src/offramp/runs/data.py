"""The data that a run was trained for, in batches."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from offramp.data.images import make_loader
from offramp.data.sources import SOURCES
from offramp.runs.run import Run, load_batches


def load_data(run: Run, split: str | None = None, *, data: str | None = None) -> DataLoader[Any]:
    """Load a split of a run's data, as :func:`~offramp.collect` and ``evaluate`` take it.

    Args:
        run: A run of a recipe, which names the data.
        split: A split of the data set, or "calibration", which is cut from train; if None, the
            split that figures are on: test, where there is one.
        data: Folder with ``<split>.parquet``; if None, where the run found its data.
    Returns:
        Batches of (inputs, labels), prepared as for the network, in a fixed order; images of the
        train split are augmented as in training.
    Raises:
        ArtifactError: If the run holds a network of the user's own.
        InvalidArgumentError: If there is no such split, or the recipe sets no calibration data
            aside.
        DataError: If the data is missing or damaged.
    """
    recipe = run.require_recipe()
    split = split or SOURCES[recipe.data].judging_split
    batches, _, _ = load_batches(recipe, split, data or run.data)
    return make_loader(batches, batch_size=batches.run_batch_size)
