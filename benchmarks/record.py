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
import typer

import offramp
from offramp.artifacts import atomic_path
from offramp.evaluation.timing import hardware_name


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


def read_rows(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that were measured before; refuses a file of other settings."""
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    different = [key for key, value in settings.items() if content.get(key) != value]
    if different:
        raise typer.BadParameter(
            f"{path} holds results of other settings ({', '.join(different)}): choose another file"
        )
    rows: list[dict[str, Any]] = content["rows"]
    return rows
