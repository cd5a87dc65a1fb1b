"""Networks of ours among the backbones that gates and halting are put on."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from offramp.model.multi_exit import MultiExitNetwork
from offramp.model.ragged import Ragged


class OwnParts(NamedTuple):
    """The parts of a network of ours with one exit.

    Attributes:
        stage: All of it but for its head.
        head: The head.
        ragged: Where padding is marked; None where all samples are of one size.
        plain: The same as one ordinary network.
    """

    stage: nn.Module
    head: nn.Module
    ragged: Ragged | None
    plain: nn.Module


def own_parts(network: nn.Module) -> OwnParts | None:
    """Take a network of ours with one exit apart; None of another one."""
    if not (isinstance(network, MultiExitNetwork) and network.num_exits == 1):
        return None
    return OwnParts(network.stages[0], network.exits[0], network.ragged, network.plain())
