"""Links connect two parts of a network.

A link takes what a part is given, brings it there, and brings back what was answered. This module
has the contract, and the link of a part in the same process; ``http_link.py`` has the one that
crosses a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from offramp.errors import OfframpError, PayloadError, reason
from offramp.serving.served import ServedModel

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Answer that came back over a link.

    Attributes:
        outputs: Answers by name, each with the batch axis first.
        sent_bytes: Bytes that went over the link, headers included, as the link counts them.
        received_bytes: Bytes that came back, headers included.
    """

    outputs: Mapping[str, Array]
    sent_bytes: int
    received_bytes: int


class Link(Protocol):
    """Brings samples to another part and answers back. Several threads may use one at once."""

    def send(
        self, inputs: Mapping[str, Array], *, timeout_s: float, compresses: bool = False
    ) -> Reply:
        """Ask the other part once."""

    def check(self, *, timeout_s: float) -> None:
        """Make sure, without samples, that the other part is there and has the same bundle."""

    def close(self) -> None:
        """Let go of connections; the link is not used again."""


class InProcessLink:
    """A link to a part in the same process: nothing is copied, only the tensors' bytes count."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    def send(
        self, inputs: Mapping[str, Array], *, timeout_s: float, compresses: bool = False
    ) -> Reply:
        """See :meth:`Link.send`; it answers whenever it is done."""
        del timeout_s, compresses
        try:
            outputs = self._model.run(self._model.prepare(inputs, {}))
        except OfframpError:
            raise
        except Exception as error:  # as over a network, nothing of the other part comes through
            raise PayloadError(f"The part behind the link failed: {reason(error)}") from error
        return Reply(
            outputs=outputs,
            sent_bytes=count_bytes(inputs.values()),
            received_bytes=count_bytes(outputs.values()),
        )

    def check(self, *, timeout_s: float) -> None:
        """It is there."""
        del timeout_s

    def close(self) -> None:
        """Nothing to let go of."""


def count_bytes(tensors: Iterable[Array]) -> int:
    """Bytes of some tensors, nothing around them."""
    return sum(np.asarray(tensor).nbytes for tensor in tensors)
