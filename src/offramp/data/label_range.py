"""Checking that labels are classes of a network: no torch.

Shapes: ``B`` batch.
"""

from __future__ import annotations

from offramp.errors import DataError
from offramp.measure.arrays import Numbers, as_array
from offramp.measure.outputs import IGNORED_LABEL


def check_labels(labels_B: Numbers, *, num_classes: int) -> None:
    """Refuse labels that the network has no output for."""
    labels = as_array(labels_B)
    of_pixels = labels.ndim == 3
    if of_pixels:
        labels = labels[labels != IGNORED_LABEL]
    if labels.size == 0:
        return
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or largest >= num_classes:
        wrong = smallest if smallest < 0 else largest
        advice = "Check the data set, or build the network with more classes."
        if smallest < 0:
            advice = "Where that stands for samples without a label, leave them out."
            if of_pixels:
                advice = f"Where that stands for pixels without a class, mark them {IGNORED_LABEL}."
        raise DataError(
            f"Labels must be in [0, {num_classes - 1}], one per output of the network. "
            f"Got {wrong}. {advice}"
        )
