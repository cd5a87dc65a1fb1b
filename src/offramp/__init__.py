"""Offramp makes neural networks stop early, so that the clock shows the saving.

Public names are listed in ``__init__.pyi`` and loaded when they are first used: ``import offramp``
alone imports no torch.
"""

import importlib
import re
import warnings
from pathlib import Path
from typing import Any

from offramp.errors import missing_extra

__version__ = "0.1.0"

_HOMES: dict[str, str] = {
    name: module
    for module, name in re.findall(
        r"^from (\S+) import (\w+) as", Path(__file__).with_suffix(".pyi").read_text("utf-8"), re.M
    )
}

_RENAMED = {
    "choose_threshold": "calibrate",
    "choose_threshold_with_guarantee": "calibrate_with_guarantee",
    "collect_sweep": "collect(network, data, thresholds=...)",
}
"""Names of 0.1 that warn, and what to write instead."""

__all__ = sorted(_HOMES.keys() - _RENAMED.keys())


def __getattr__(name: str) -> Any:
    target = name
    if name in _RENAMED:
        warnings.warn(
            f"offramp.{name} goes in the next release: use offramp.{_RENAMED[name]}.",
            DeprecationWarning,
            stacklevel=2,
        )
        target = name if name in _HOMES else _RENAMED[name]
    if target not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_HOMES[target]), target)
    except ModuleNotFoundError as error:
        raise missing_extra(f"offramp.{name}", error) from error
    if name not in _RENAMED:
        globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
