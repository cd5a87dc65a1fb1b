"""``offramp predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli.artifact import open_artifact
from offramp.cli.options import DeviceOption, RunOrBundle, percent


def predict(
    run: RunOrBundle,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Upright images.")],
    device: DeviceOption = None,
) -> None:
    """Print label, confidence, exit and share of the plain network's MACs for image files."""
    import torch

    from offramp.inference.pictures import read_picture
    from offramp.training.sources import SOURCES

    asked = open_artifact(run, device)
    recipe, names = asked.recipe, asked.class_names
    pixels = torch.stack([read_picture(file, SOURCES[recipe.data]) for file in files])
    inputs = recipe.normalisation(pixels).to(asked.device)
    result = asked.runner.run(inputs)
    plain_macs = asked.plain_macs(inputs)
    for position, file in enumerate(files):
        index = int(result.output[position].argmax())
        label = names[index] if index < len(names) else str(index)
        print(
            f"{file}: {label}  confidence {float(result.confidence[position]):.3f}  "
            f"exit {int(result.exit_index[position])}  "
            f"{percent(int(result.macs[position]) / plain_macs)} of the plain network's MACs"
        )
