"""Name of the hardware that computes here."""

from __future__ import annotations

import os
import platform


def processor_name() -> str:
    """Name this machine's processor."""
    return f"{_processor_model()}, {os.cpu_count()} cores"


def _processor_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
