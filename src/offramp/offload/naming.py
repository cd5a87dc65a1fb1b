"""Names of the parts of a model, and of the bundle that they are of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from offramp.runtime.bundle import Bundle


def identity(bundle: Bundle) -> str:
    """Identify what two parts must share: the steps and all numbers that decide."""
    steps = json.dumps([asdict(step) for step in bundle.steps], sort_keys=True)
    return hashlib.sha256(steps.encode()).hexdigest()[:16]


def part_name(name: str, starts_after: int) -> str:
    """Name the part of a model that starts behind a stage."""
    return f"{name}.from{starts_after + 1}"
