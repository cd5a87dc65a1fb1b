"""torchvision beside a torch it was not built for."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch


@cache
def define_missing_ops() -> None:
    """Let torchvision, and timm which needs it, be imported where its own library does not load.

    A torchvision built for CUDA stops at ``import`` beside a torch for the CPU, since operators
    are missing that only object detection runs. Defined without a body they are enough for
    models, transforms and data sets. Where torchvision loads as it is, or is not installed,
    nothing happens. To be called before the first import.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    for library in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError:
            break
    else:
        return
    operators = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        operators.define(  # type: ignore[no-untyped-call]
            f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    _KEPT.append(operators)


_KEPT: list[torch.library.Library] = []
"""Definitions live as long as their library object."""
