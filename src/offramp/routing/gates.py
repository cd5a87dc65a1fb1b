"""Gates: small networks that say, from the features in front of a block, whether it shall run.

Shapes: ``B`` batch, ``C`` channels, ``H W`` pixels, ``G`` gates, ``E`` units of a recurrent gate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from offramp.errors import InvalidArgumentError

GateState = tuple[Tensor, ...]
"""The state of the gates, per sample: tensors with their batch axis first."""

_OPEN_SCORE = 2.0
"""Bias of a new gate, which then runs a block with 0.88: a network that starts to train with its
blocks skipped learns to do without them."""


class Gates(nn.Module, ABC):
    """The gates of a network, one for each block that may be skipped."""

    @abstractmethod
    def forward(self, index: int, x: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """Say how much a block should run."""


class RecurrentGates(Gates):
    """One LSTM that all gates share: it reads the pooled features and remembers those before.

    Reference: Wang et al. (2018), SkipNet, section 3.1, recurrent gates; 10 units as there.
    """

    def __init__(self, channels: Sequence[int], *, units: int = 10) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.projections = nn.ModuleDict(
            {str(width): nn.Linear(width, units) for width in sorted(set(channels))}
        )
        self.cell = nn.LSTMCell(units, units)
        self.score = _open_score(units)

    def forward(self, index: int, x: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """See :meth:`Gates.forward`; the state is the LSTM's, two tensors of shape (B, E)."""
        projection = self.projections[str(self.channels[index])]
        pooled_BC = x.mean((-2, -1))
        if torch.onnx.is_in_onnx_export():
            state = self._step_of_few_nodes(projection, pooled_BC, state)
        else:
            state = self.cell(projection(pooled_BC), state or None)
        return self.score(state[0])[:, 0], state

    def _step_of_few_nodes(
        self, projection: nn.Module, x_BC: Tensor, state: GateState
    ) -> GateState:
        """Projection and LSTM with one product, for a graph that pays for every node.

        The weights, put together in the graph, are constants of it: onnxruntime computes them once.
        """
        assert isinstance(projection, nn.Linear)
        cell, units = self.cell, self.cell.hidden_size
        weights = cell.weight_ih @ projection.weight
        bias = cell.weight_ih @ projection.bias + cell.bias_ih + cell.bias_hh
        if state:
            x_BC = torch.cat([x_BC, state[0]], 1)
            weights = torch.cat([weights, cell.weight_hh], 1)
        cell_first = torch.arange(4 * units).roll(2 * units)  # then out, in, forget
        scores = F.linear(x_BC, weights[cell_first], bias[cell_first])
        new_BE, gates = torch.split(scores, [units, 3 * units], 1)
        out_BE, in_BE, forget_BE = gates.sigmoid().chunk(3, 1)
        memory_BE = in_BE * new_BE.tanh()
        if state:
            memory_BE = memory_BE + forget_BE * state[1]
        return out_BE * memory_BE.tanh(), memory_BE


class FeedForwardGates(Gates):
    """Gates of their own: two convolutions on the pooled map, and a score. No memory.

    Reference: Wang et al. (2018), SkipNet, section 3.1, FFGate; one score and its sigmoid stand
        for the softmax over two.
    """

    def __init__(self, channels: Sequence[int], *, width: int | None = None) -> None:
        super().__init__()
        self.gates = nn.ModuleList(_feed_forward_gate(each, width or each) for each in channels)

    def forward(self, index: int, x: Tensor, state: GateState) -> tuple[Tensor, GateState]:
        """See :meth:`Gates.forward`; the state stays empty."""
        # A map of one pixel has nothing left to pool.
        pooled = F.max_pool2d(x, 2) if min(x.shape[-2:]) > 1 else x
        return self.gates[index](pooled)[:, 0], ()


def _feed_forward_gate(channels: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        _open_score(width),
    )


def _open_score(features: int) -> nn.Linear:
    score = nn.Linear(features, 1)
    nn.init.constant_(score.bias, _OPEN_SCORE)
    return score


def _recurrent(channels: Sequence[int], width: int | None) -> Gates:
    return RecurrentGates(channels) if width is None else RecurrentGates(channels, units=width)


def _feed_forward(channels: Sequence[int], width: int | None) -> Gates:
    return FeedForwardGates(channels, width=width)


GATES: dict[str, Callable[[Sequence[int], int | None], Gates]] = {
    "recurrent": _recurrent,
    "feed_forward": _feed_forward,
}
"""Kinds of gates by name."""


def make_gates(kind: str, channels: Sequence[int], width: int | None = None) -> Gates:
    """Build gates."""
    if kind not in GATES:
        raise InvalidArgumentError(
            f"The 'gates' parameter must be one of {', '.join(GATES)}. Got {kind!r}."
        )
    if width is not None and width < 1:
        raise InvalidArgumentError(
            f"The 'gate_width' parameter must be an int of at least 1. Got {width}."
        )
    return GATES[kind](channels, width)
