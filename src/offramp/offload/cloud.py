"""The part behind a link, as a server serves it: it takes features, and goes on from there.

Shapes: ``B`` batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.offload.answers import ANSWER_DTYPES, PartAnswer, answer_specs, as_answer
from offramp.offload.codec import decode
from offramp.offload.edge import EdgeRunner
from offramp.offload.naming import identity, part_name
from offramp.runtime.bundle import Bundle
from offramp.runtime.part import PartSession, carried_specs, check_carried, cuts, first_step
from offramp.serving.served import Parameter, check_finite, in_order

Array = npt.NDArray[Any]


class PartModel:
    """Serves a part of a network, which goes on with what another part sends.

    Its version is the bundle's :func:`~offramp.offload.naming.identity`, so that whoever has
    another bundle asks for a version that is not there. Features may come in any codec's types.
    """

    def __init__(
        self,
        bundle: Bundle,
        answer: Callable[[list[Array], float | None], PartAnswer],
        *,
        name: str,
        starts_after: int,
        output_shape: tuple[int | None, ...],
    ) -> None:
        first = first_step(bundle, starts_after, "starts_after")
        self.name, self.version = part_name(name, starts_after), identity(bundle)
        self.inputs = carried_specs(bundle, first)
        self.outputs = answer_specs(output_shape)
        self.metadata = {"starts_after": str(starts_after), "bundle": self.version}
        self._step = bundle.steps[first]
        self._multiple = (bundle.pixel_multiple or 1) if first == 0 else 1
        self._answer = answer

    def prepare(
        self, inputs: Mapping[str, Array], parameters: Mapping[str, Parameter]
    ) -> list[Array]:
        """Check what was sent and read it."""
        carried = decode(in_order(self.inputs, inputs), self._step)
        check_finite(self.inputs, carried)
        return check_carried(self.inputs, carried, multiple=self._multiple)

    def run(self, arrays: list[Array], *, deadline_ms: float | None = None) -> dict[str, Array]:
        """Answer a batch."""
        answer = self._answer(arrays, deadline_ms)
        return {
            name: np.asarray(getattr(answer, name)).astype(dtype, copy=False)
            for name, dtype in ANSWER_DTYPES.items()
        }


def cloud_models(session: PartSession, name: str) -> list[PartModel]:
    """Serve what is behind every cut of the part that ends with the last stage."""

    def behind(cut: int) -> PartModel:
        return PartModel(
            session.bundle,
            lambda carried, _: as_answer(session.run(carried, starts_after=cut)),
            name=name,
            starts_after=cut,
            output_shape=session.output_shape,
        )

    return [behind(cuts(session.bundle)[first]) for first in session.part]


def middle_model(runner: EdgeRunner, name: str) -> PartModel:
    """Serve a part between two others."""
    return PartModel(
        runner.bundle,
        lambda carried, deadline_ms: runner.answer(carried, deadline_ms=deadline_ms),
        name=name,
        starts_after=runner.starts_after,
        output_shape=runner.output_shape,
    )
