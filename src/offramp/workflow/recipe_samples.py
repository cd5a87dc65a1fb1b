"""Samples of the data set that a recipe names; torch loads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from offramp.data.folders import draw_evenly, find_split
from offramp.data.known_sources import SOURCES
from offramp.data.own import load_own
from offramp.errors import ArtifactError, DataError, InvalidArgumentError
from offramp.recipes.recipe import Recipe
from offramp.runs.run import load_batches
from offramp.runtime import Bundle
from offramp.runtime.bundle import BUNDLE_FILE
from offramp.runtime.chosen_on import CALIBRATION_SPLIT
from offramp.workflow.samples import CALIBRATION, JUDGING, Samples, samples_of_split


@dataclass(frozen=True, kw_only=True)
class RecipeSamples:
    """The data set that a recipe names, wherever it lies.

    Attributes:
        recipe: The recipe.
        data: What ``--data`` was in training; None for the default.
        class_names: Of the network.
    """

    recipe: Recipe
    data: str | None
    class_names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the data."""
        return self.recipe.data

    @property
    def has_calibration(self) -> bool:
        """True if samples were set aside to choose thresholds on."""
        return self.recipe.calibration_share > 0

    @property
    def judging_split(self) -> str | None:
        """The split that figures are on where none is named."""
        return SOURCES[self.recipe.data].judging_split

    def load(
        self,
        split: str | None = None,
        *,
        data: str | None = None,
        subset: int | None = None,
        preferred: Sequence[str] = JUDGING,
    ) -> Samples:
        """Load a split."""
        recipe, where = self.recipe, data or self.data
        if preferred == CALIBRATION and split is None:
            split = CALIBRATION_SPLIT
        named = split or SOURCES[recipe.data].judging_split
        if self._is_own(split, named, where):
            own = load_own(
                str(where),
                split,
                recipe.preprocessing(),
                class_names=self.class_names,
                num_classes=int(recipe.network_options["num_classes"]),
                subset=subset,
                preferred=preferred,
            )
            return samples_of_split(
                own, name=recipe.data, class_names=self.class_names, subset=subset
            )
        batches, class_names, fingerprint = load_batches(recipe, named, where)
        batches = batches.unaugmented()
        if subset is not None:
            batches = batches.subset(torch.tensor(draw_evenly(batches.strata_N.numpy(), subset)))
        return Samples(
            name=recipe.data,
            split=named,
            batches=batches,
            fingerprint=fingerprint,
            class_names=class_names,
            class_prior="uniform" if recipe.uniform_prior else "as in train",
            by_class=True,
        )

    def _is_own(self, split: str | None, named: str, data: str | None) -> bool:
        """Return True if the samples lie there in another way than the data set does."""
        source = SOURCES[self.recipe.data]
        if data is None or data == source.download or source.ignored_label is not None:
            return False
        trains = ("train", CALIBRATION_SPLIT)
        if named in trains or (Path(data) / f"{named}.parquet").is_file():
            return False
        try:
            return find_split(Path(data), split, preferred=(named, *JUDGING)).name not in trains
        except (DataError, InvalidArgumentError):
            return False


def recipe_of(bundle: Bundle) -> Recipe:
    """Find the recipe that a bundle's network was trained by."""
    if bundle.recipe is None:
        raise ArtifactError(
            f"The bundle {bundle.folder} holds a network of your own, without a recipe that names "
            "its data. Use Session(...).run() from Python."
        )
    try:
        return Recipe.from_dict(bundle.recipe)
    except ArtifactError as error:
        raise ArtifactError(f"{bundle.folder / BUNDLE_FILE} is damaged: {error}") from error
