"""Samples for a run or a bundle: of its recipe's data set, or of data as users have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from offramp.data.arrays import ArrayBatches
from offramp.data.own import OwnSplit, load_own
from offramp.data.own_masks import load_own_masks
from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.runtime import Bundle
from offramp.runtime.chosen_on import CALIBRATION_SPLIT
from offramp.runtime.preprocessing import AnyPreprocessing

if TYPE_CHECKING:  # samples of one's own need no torch
    from offramp.data.images import Batches
    from offramp.workflow.recipe_samples import RecipeSamples

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
            return samples_of_split(masks, name=name, class_names=self.class_names, subset=None)
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
        return samples_of_split(own, name=name, class_names=self.class_names, subset=subset)


AnySamples: TypeAlias = "RecipeSamples | OwnSamples"


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


def samples_of_split(
    own: OwnSplit, *, name: str, class_names: tuple[str, ...], subset: int | None
) -> Samples:
    """Make samples of a split as users have it."""
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
