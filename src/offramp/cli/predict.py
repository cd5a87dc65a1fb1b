"""``offramp predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli.options import DeviceOption, RunFolder, percent, pick_device


def predict(
    run: RunFolder,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Upright images.")],
    device: DeviceOption = None,
) -> None:
    """Print label, confidence, exit and share of the plain network's MACs for image files."""
    import torch

    from offramp.inference.pictures import read_picture
    from offramp.inference.runner import AdaptiveRunner
    from offramp.training.run import load
    from offramp.training.sources import SOURCES

    loaded = load(run)
    recipe = loaded.require_recipe()
    where = pick_device(device)
    runner = AdaptiveRunner(loaded.network.to(where), loaded.policy)
    pixels = torch.stack([read_picture(file, SOURCES[recipe.data]) for file in files])
    inputs = recipe.normalisation(pixels).to(where)
    result = runner.run(inputs)
    plain_macs = loaded.network.costs(inputs).plain_macs
    for position, file in enumerate(files):
        index = int(result.output[position].argmax())
        label = loaded.class_names[index] if index < len(loaded.class_names) else str(index)
        print(
            f"{file}: {label}  confidence {float(result.confidence[position]):.3f}  "
            f"exit {int(result.exit_index[position])}  "
            f"{percent(int(result.macs[position]) / plain_macs)} of the plain network's MACs"
        )
