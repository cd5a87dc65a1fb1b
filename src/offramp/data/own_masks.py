"""Pictures and their masks as users have them: folders ``images`` and ``masks`` of equal stems.

Shapes: ``N`` samples, ``H W`` pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from offramp.data.arrays import PictureArrays
from offramp.data.folders import draw_evenly, find_split
from offramp.data.label_range import check_labels
from offramp.data.own import OwnSplit, PictureStore, Samples
from offramp.data.parquet import decoded
from offramp.data.pictures import quiet_pillow, read_mask_file
from offramp.data.preprocessing import Pixels, fit_pixels
from offramp.errors import DataError
from offramp.measure.outputs import IGNORED_LABEL
from offramp.runtime.preprocessing import AnyPreprocessing, Preprocessing

_FOLDERS = ("images", "masks")


def load_own_masks(
    data: Path | str,
    split: str | None,
    preprocessing: AnyPreprocessing,
    *,
    num_classes: int | None = None,
    subset: int | None = None,
    preferred: Sequence[str] = (),
) -> OwnSplit:
    """Load a split of pictures with masks, which hold the number of each pixel's class.

    A mask is brought into the network's size as its picture is, by the nearest pixel; 255 stands
    for no class.
    """
    files = find_split(Path(data), split, preferred=preferred)
    found = files.classes or {}
    if set(found) != set(_FOLDERS) or not isinstance(preprocessing, Preprocessing):
        raise DataError(
            f"Expected pictures in {data} for a network that says a class for every pixel: "
            "<split>/images/*.png, and masks of the same names in <split>/masks/*.png. Found "
            f"{', '.join(sorted(found)) or files.name}."
        )
    pictures, masks = ({path.stem: path for path in found[name]} for name in _FOLDERS)
    alone = sorted(set(pictures) ^ set(masks))
    if alone or len(pictures) < len(found["images"]):
        what = alone[0] if alone else "two pictures of one name"
        raise DataError(
            f"Expected a mask of the same name for each picture in {next(iter(pictures.values()))}"
            f" and beside it. Got {len(pictures)} pictures and {len(masks)} masks, such as {what} "
            "alone."
        )
    stems = sorted(pictures)
    fingerprint = hashlib.sha256()
    for stem in stems:
        for path in (pictures[stem], masks[stem]):
            fingerprint.update(hashlib.sha256(path.read_bytes()).digest())
    rows = list(range(len(stems)))
    if subset is not None:
        rows = draw_evenly(np.zeros(len(stems), dtype=np.int64), subset)
    labels_NHW = np.stack([_read_mask(masks[stems[row]], preprocessing) for row in rows])
    if num_classes is not None:
        check_labels(labels_NHW[labels_NHW != IGNORED_LABEL], num_classes=num_classes)
    paths = [pictures[stem] for stem in stems]
    where = paths[0].parent
    samples = Samples(
        where=where,
        content=lambda row: paths[row].read_bytes(),
        labels=stems,
        files=paths,
    )
    encoded = PictureStore(samples, rows, preprocessing)
    store = decoded(encoded, len(rows), preprocessing.shape, where)
    return OwnSplit(
        name=files.name,
        batches=PictureArrays(store, labels_NHW.astype(np.int64), preprocessing),
        fingerprint=fingerprint.hexdigest(),
        num_samples=len(stems),
        shares=(),
    )


def _read_mask(path: Path, preprocessing: Preprocessing) -> Pixels:
    nearest = replace(
        preprocessing,
        channels=1,
        mean=0.0,
        deviation=1.0,
        interpolation="nearest",
        light_on_dark=False,
    )
    try:
        with quiet_pillow():
            numbers = read_mask_file(path)
    except DataError as error:
        raise DataError(f"Expected a mask in {path}, one number a pixel: {error}.") from error
    mask_1HW = fit_pixels(numbers.reshape(numbers.shape[-2:]), nearest)
    return mask_1HW.reshape(mask_1HW.shape[1:])
