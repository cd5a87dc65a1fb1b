"""A part of a bundle: some consecutive steps of a network with exits, on one machine of several.

Shapes: ``B`` batch, ``S`` samples that go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.runtime.bundle import Bundle, read_bundle
from offramp.runtime.exit_steps import ExitSteps, Part
from offramp.runtime.files import TensorSpec
from offramp.runtime.loading import Loader

Array = npt.NDArray[Any]

ALL_BEYOND = -1
"""``split_after`` that leaves nothing on this machine, and ``starts_after`` of the first part."""


class PartSession:
    """Runs the stages of a bundle between two cuts.

    Only their files are loaded. The part that ends with the last stage lets every sample go.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        starts_after: int = ALL_BEYOND,
        split_after: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        last = self.bundle.num_exits - 1 if split_after is None else split_after
        first = first_step(self.bundle, starts_after, "starts_after")
        stop = first_step(self.bundle, last, "split_after")
        if stop <= first:
            raise InvalidArgumentError(
                f"The 'split_after' parameter must be above {starts_after}, where the part starts. "
                f"Got {last}."
            )
        self.part = range(first, stop)
        self._steps = ExitSteps(self.bundle, Loader(self.bundle, threads=threads), self.part)

    @property
    def output_shape(self) -> tuple[int | None, ...]:
        """Shape of a sample's logits; None for axes that are as long as the image's."""
        return self._steps.output_shape

    def run(self, carried: Sequence[Array], *, starts_after: int | None = None) -> Part:
        """Run the part on a batch."""
        first = None
        if starts_after is not None:
            first = first_step(self.bundle, starts_after, "starts_after")
            if first not in self.part:
                raise InvalidArgumentError(
                    f"The 'starts_after' parameter must be a cut within the part. "
                    f"Got {starts_after}."
                )
        return self._steps.run_part(list(carried), first=first)


def cuts(bundle: Bundle) -> tuple[int, ...]:
    """List the places where a bundle can be cut between machines."""
    if bundle.family != "exits":
        raise InvalidArgumentError(
            f"Expected a bundle of a network with exits. {bundle.folder} holds one of the family "
            f"{bundle.family}: it is not cut between machines."
        )
    return (ALL_BEYOND, *(step.exit_index for step in bundle.steps))


def first_step(bundle: Bundle, after: int, name: str) -> int:
    """The first step behind a cut."""
    valid = cuts(bundle)
    if after not in valid:
        is_off = f" Exit {after} is off there." if 0 <= after < bundle.num_exits else ""
        raise InvalidArgumentError(
            f"The '{name}' parameter must be one of {', '.join(map(str, valid))}, the cuts of "
            f"{bundle.folder}. Got {after}.{is_off}"
        )
    return valid.index(after)


def carried_specs(bundle: Bundle, step: int) -> tuple[TensorSpec, ...]:
    """List the tensors that cross to a step."""
    return (*bundle.steps[step].features, *bundle.steps[step].state)


def check_carried(
    specs: Sequence[TensorSpec], tensors: Sequence[Array], *, multiple: int = 1
) -> list[Array]:
    """Make sure that what came over a link fits a step."""
    fits = len(tensors) == len(specs) and all(
        tensor.ndim
        and spec.fits(tensor.shape[1:], multiple)
        and tensor.dtype == np.dtype(spec.dtype)
        and len(tensor) == len(tensors[0]) > 0
        for tensor, spec in zip(tensors, specs, strict=True)
    )
    if not fits:
        expected = ", ".join(f"{s.name} {s.dtype} {(None, *s.sample_shape)}" for s in specs)
        got = ", ".join(f"{tensor.dtype} {tensor.shape}" for tensor in tensors)
        raise ShapeError(f"Expected {expected}, None for any number of rows. Got {got}.")
    return [np.ascontiguousarray(tensor) for tensor in tensors]
