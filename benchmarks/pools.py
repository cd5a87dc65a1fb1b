"""Logits that benchmarks of choosing draw from, and the rivals written out in tests/reference."""

from __future__ import annotations

import sys
from pathlib import Path

from offramp import ExitLogits
from offramp.calibration.collect import read_logits

FOLDER = Path(__file__).parent / "logits"
NAMES = ("emnist-convnet", "cifar10-resnet")

sys.path.append(str(Path(__file__).parents[1] / "tests" / "reference"))
import rival_thresholds as rivals  # noqa: E402

__all__ = ["FOLDER", "NAMES", "front_file", "pool_file", "read_front", "read_pool", "rivals"]


def pool_file(name: str) -> Path:
    """Where the logits of a run are."""
    return FOLDER / f"{name}.safetensors"


def read_pool(name: str) -> ExitLogits:
    """The logits of a run on test images."""
    return read_logits(pool_file(name))


def front_file(name: str) -> Path:
    """Where the logits of a run on train images are, which find fronts."""
    return FOLDER / f"{name}-train.safetensors"


def read_front(name: str) -> ExitLogits:
    """The logits of a run on train images that its calibration samples are not among."""
    return read_logits(front_file(name))
