"""What a published figure has to carry, and where it is written."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import offramp
from offramp.artifacts import atomic_path
from offramp.inference.timing import hardware_name


def circumstances() -> dict[str, Any]:
    """What a published figure has to carry."""
    return {
        "hardware": hardware_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "offramp": offramp.__version__,
        },
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def write_json(content: dict[str, Any], path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
