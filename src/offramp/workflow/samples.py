"""Samples for a run or a bundle: of its recipe's data set, or of data as users have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.data.arrays import ArrayBatches
from offramp.data.folders import draw_evenly, find_split
from offramp.data.known_sources import SOURCES
from offramp.data.own import OwnSplit, load_own
from offramp.data.own_masks import load_own_masks
from offramp.errors import ArtifactError, DataError, InvalidArgumentError
from offramp.measure.outputs import MAPS
from offramp.runtime import Bundle
from offramp.runtime.chosen_on import CALIBRATION_SPLIT
from offramp.runtime.preprocessing import AnyPreprocessing

if TYPE_CHECKING:  # samples of one's own need no torch
    from offramp.data.images import Batches
    from offramp.recipes.recipe import Recipe
    from offramp.runs.run import Run

JUDGING = ("test", "validation", "val", "valid", "dev")
"""Splits of data of one's own that figures are on where none is named, the first that there is."""
CALIBRATION = (CALIBRATION_SPLIT, "validation", "val", "valid", "dev")
"""The same of those that choose thresholds."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples of a split.

    Attributes:
        name: Of the data.
        split: Name of the split.
        batches: The samples, not augmented.
        fingerprint: Identifies them; of data of one's own, the whole split that they are of.
        class_names: As the data has them.
        class_prior: What is known of the shares of classes.
        by_class: Whether set numbers were drawn from each class.
        shares: The share of each class in the split, where the samples are an even subset of it.
    """

    name: str
    split: str
    batches: Batches | ArrayBatches
    fingerprint: str
    class_names: tuple[str, ...]
    class_prior: str
    by_class: bool
    shares: tuple[float, ...] | None = None


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
            return _samples(own, name=recipe.data, class_names=self.class_names, subset=subset)
        from offramp.runs.run import load_batches

        batches, class_names, fingerprint = load_batches(recipe, named, where)
        batches = batches.unaugmented()
        if subset is not None:
            import torch

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


@dataclass(frozen=True, kw_only=True)
class OwnSamples:
    """Data for a network of one's own, whose bundle or run says how samples become inputs.

    Attributes:
        of: The bundle or the run, in words.
        preprocessing: As it says, or as it is taken to be; None where it says nothing.
        class_names: Of the network.
        num_classes: Of the network; None where that is not known.
        num_inputs: Of the network.
        length: Tokens of every text, where the network takes no others.
        maps: Whether it says a class for every pixel.
        data: Where its data was in training; None where that is not known.
    """

    of: str
    preprocessing: AnyPreprocessing | None
    class_names: tuple[str, ...]
    num_classes: int | None
    num_inputs: int = 1
    length: int | None = None
    maps: bool = False
    data: str | None = None

    name = "own data"
    has_calibration = True
    judging_split = None

    def load(
        self,
        split: str | None = None,
        *,
        data: str | None = None,
        subset: int | None = None,
        preferred: Sequence[str] = JUDGING,
    ) -> Samples:
        """Load a split."""
        where = data or self.data
        if where is None:
            raise InvalidArgumentError(
                f"The {self.of} holds a network of your own, and does not name its data. Say where "
                "it is: data=PATH."
            )
        if self.preprocessing is None:
            raise ArtifactError(
                f"The {self.of} does not say how samples become its inputs. Save it with "
                "preprocessing=Preprocessing(...) or TextPreprocessing(...)."
            )
        name = Path(where).resolve().name
        if self.maps:
            masks = load_own_masks(
                where,
                split,
                self.preprocessing,
                num_classes=self.num_classes,
                subset=subset,
                preferred=preferred,
            )
            return _samples(masks, name=name, class_names=self.class_names, subset=None)
        own = load_own(
            where,
            split,
            self.preprocessing,
            class_names=self.class_names,
            num_classes=self.num_classes,
            num_inputs=self.num_inputs,
            length=self.length,
            subset=subset,
            preferred=preferred,
        )
        return _samples(own, name=name, class_names=self.class_names, subset=subset)


AnySamples = RecipeSamples | OwnSamples


def samples_of_run(run: Run) -> AnySamples:
    """Make what loads splits of the data that a run is for."""
    if run.recipe is not None:
        return RecipeSamples(recipe=run.recipe, data=run.data, class_names=run.class_names)
    from offramp.runs.own_network import num_inputs_of  # torch, which bundles do not need

    return OwnSamples(
        of=f"run {run.folder}",
        preprocessing=run.preprocessing,
        class_names=run.class_names,
        num_classes=run.num_classes,
        num_inputs=num_inputs_of(run.network),
        maps=run.network.outputs.name == MAPS.name,
        data=run.data,
    )


def samples_of_bundle(
    bundle: Bundle, preprocessing: AnyPreprocessing, *, num_classes: int
) -> OwnSamples:
    """Make what loads data for a bundle of a network of one's own."""
    first = bundle.inputs[0].sample_shape
    return OwnSamples(
        of=f"bundle {bundle.folder}",
        preprocessing=preprocessing,
        class_names=bundle.class_names,
        num_classes=num_classes,
        num_inputs=len(bundle.inputs),
        length=first[0] if len(first) == 1 else None,
        maps=says_maps(bundle),
    )


def _samples(
    own: OwnSplit, *, name: str, class_names: tuple[str, ...], subset: int | None
) -> Samples:
    return Samples(
        name=name,
        split=own.name,
        batches=own.batches,
        fingerprint=own.fingerprint,
        class_names=class_names,
        class_prior="as in the split",
        by_class=subset is not None,
        shares=None if subset is None else own.shares,
    )


def says_maps(bundle: Bundle) -> bool:
    """Tell if a network says a class for every pixel."""
    return bundle.pixel_multiple is not None or bundle.policy.get("kind") in ("dense", "agreement")


def draw(batches: Batches | ArrayBatches, count: int) -> Any:
    """Inputs of so many samples, drawn at random: one, or several as a tuple."""
    order = np.random.default_rng(0).permutation(len(batches))
    inputs, _ = batches.__getitems__(order[:count].tolist())
    return inputs
