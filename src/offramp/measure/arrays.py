"""Numbers as numpy has them, whether a tensor or an array came: figures and search need no torch.

Shapes: ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Numbers: TypeAlias = "Tensor | npt.NDArray[Any]"
"""A tensor or an array."""

Floats = npt.NDArray[np.float64]


def as_array(values: Numbers) -> npt.NDArray[Any]:
    """The same numbers as an array; those of a tensor on the CPU are shared."""
    detached = getattr(values, "detach", None)
    return np.asarray(values if detached is None else detached().cpu())


def softmax(logits_NC: npt.NDArray[Any]) -> Floats:
    """Probabilities over the last axis, at double precision; NaN where a logit is."""
    logits_NC = np.asarray(logits_NC, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # infinite logits say NaN
        exponentials = np.exp(logits_NC - logits_NC.max(-1, keepdims=True))
        p_NC: Floats = exponentials / exponentials.sum(-1, keepdims=True)
    return p_NC
