"""``offramp predict``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.options import DeviceOption, RunOrBundle
from offramp.workflow.artifact import open_artifact

if TYPE_CHECKING:
    from torch import Tensor

    from offramp.recipes.recipe import Recipe


def predict(
    run: RunOrBundle,
    samples: Annotated[
        list[str], typer.Argument(metavar="FILE|TEXT...", help="Upright images, or sentences.")
    ],
    device: DeviceOption = None,
) -> None:
    """Print label and probability, confidence, exit, blocks or tokens, and share of plain MACs."""
    asked = open_artifact(run, device)
    inputs = _read_samples(samples, asked.recipe).to(asked.device)
    for sample, answer in zip(samples, asked.answer(inputs), strict=True):
        print(f"{sample}: {answer}")


def _read_samples(samples: list[str], recipe: Recipe) -> Tensor:
    """Bring image files, or sentences, into the form that the recipe's network takes."""
    import torch

    from offramp.data.fitted_pictures import read_picture
    from offramp.data.sources import SOURCES
    from offramp.data.texts import encode_padded
    from offramp.zoo.text import load_tokenizer

    source = SOURCES[recipe.data]
    if source.image_shape is None:
        return encode_padded(load_tokenizer(), samples)
    return recipe.require_normalisation()(
        torch.stack([read_picture(file, source) for file in samples])
    )
