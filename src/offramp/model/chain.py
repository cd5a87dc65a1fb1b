"""Cutting a backbone whose children run one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

from torch import nn

from offramp.model.tracing import require_calls_in_order


class Chain:
    """The pieces of a backbone that run in order: its children, nested ``nn.Sequential`` opened."""

    num_read = 1
    ragged = None
    between: Mapping[str, int] = MappingProxyType({})

    def __init__(self, backbone: nn.Module) -> None:
        self._steps = _steps(backbone)
        if not _runs_in_order(backbone):
            require_calls_in_order(backbone, [module for _, module in self._steps])
        ends: dict[str, int] = {}
        for position, (path, _) in enumerate(self._steps, start=1):
            parts = path.split(".")
            # Of the containers around a step, too: the last step in one sets its end.
            ends |= {".".join(parts[:depth]): position for depth in range(1, len(parts) + 1)}
        self._last = len(self._steps)
        self._ends = ends

    @property
    def places(self) -> Mapping[str, int]:
        """The position after each piece, and after each container of pieces, but the last."""
        return {path: end for path, end in self._ends.items() if end < self._last}

    @property
    def refused(self) -> Mapping[str, str]:
        """The last pieces."""
        why = "the backbone ends there, in the final exit"
        return {path: why for path, end in self._ends.items() if end == self._last}

    def is_narrow(self, position: int) -> bool:
        """One tensor crosses everywhere."""
        return True

    def stages(self, positions: Sequence[int]) -> list[nn.Module]:
        """The slices between positions, as ``nn.Sequential``."""
        modules = [module for _, module in self._steps]
        return [
            nn.Sequential(*modules[start:end])
            for start, end in pairwise((0, *positions, self._last))
        ]


def _steps(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children by path, nested ``nn.Sequential`` opened; one that stands twice is there twice."""
    steps = []
    named = module.named_modules(remove_duplicate=False)
    for name, child in ((name, child) for name, child in named if name and "." not in name):
        inner = _steps(child) if _runs_in_order(child) else []
        steps += [(f"{name}.{path}", piece) for path, piece in inner] or [(name, child)]
    return steps


def _runs_in_order(module: nn.Module) -> bool:
    """Return True for an ``nn.Sequential`` that does nothing else.

    A subclass with a forward of its own may do anything with its children, and so may a hook.
    """
    if not isinstance(module, nn.Sequential) or "forward" in vars(module):
        return False
    is_sequential = type(module).forward is nn.Sequential.forward
    return is_sequential and not (module._forward_hooks or module._forward_pre_hooks)
