"""Running bundles with numpy and onnxruntime alone."""

from offramp.runtime.bundle import (
    Bundle,
    Step,
    read_bundle,
    with_routing_threshold,
    with_thresholds,
)
from offramp.runtime.session import PlainSession, Session

__all__ = [
    "Bundle",
    "PlainSession",
    "Session",
    "Step",
    "read_bundle",
    "with_routing_threshold",
    "with_thresholds",
]
