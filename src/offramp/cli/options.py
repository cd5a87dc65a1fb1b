"""Options that several commands share, and how figures are printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.artifacts import atomic_path
from offramp.errors import InvalidArgumentError

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
RunOrBundle = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a bundle.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Folder with <split>.parquet, or emnist-balanced; else $OFFRAMP_DATA/<name>.",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="cpu|cuda", help="Default: cuda where there is one.")
]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - for stdout."),
]


def write_figures(content: dict[str, Any], destination: str) -> None:
    """Write figures as JSON."""
    text = json.dumps(content, indent=2)
    if destination == "-":
        sys.stdout.write(text + "\n")
        return
    with atomic_path(Path(destination)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def parse_settings(settings: list[str]) -> dict[str, str]:
    """Split ``key=value`` texts."""
    pairs = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InvalidArgumentError(f"Expected --set key=value. Got {setting!r}.")
        pairs[key.strip()] = value.strip()
    return pairs


def use_threads(threads: int | None) -> None:
    """Let torch compute with so many threads."""
    import torch

    if threads is None:
        return
    if threads < 1:
        raise InvalidArgumentError(f"--threads must be an int of at least 1. Got {threads}.")
    torch.set_num_threads(threads)
