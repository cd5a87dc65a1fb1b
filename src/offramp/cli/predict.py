"""``offramp predict``."""

from __future__ import annotations

import torch
from torch import Tensor

from offramp.cli.options import Predict
from offramp.data.fitted_pictures import read_picture
from offramp.data.sources import SOURCES
from offramp.data.texts import encode_padded
from offramp.recipes.recipe import Recipe
from offramp.workflow.artifact import open_artifact
from offramp.zoo.text import load_tokenizer


def predict(asked: Predict) -> None:
    """Print what a run or a bundle says of samples."""
    opened = open_artifact(asked.run, asked.device)
    inputs = _read_samples(asked.samples, opened.recipe).to(opened.device)
    for sample, answer in zip(asked.samples, opened.answer(inputs), strict=True):
        print(f"{sample}: {answer}")


def _read_samples(samples: list[str], recipe: Recipe) -> Tensor:
    """Bring image files, or sentences, into the form that the recipe's network takes."""
    source = SOURCES[recipe.data]
    if source.image_shape is None:
        return encode_padded(load_tokenizer(), samples)
    return recipe.require_normalisation()(
        torch.stack([read_picture(file, source) for file in samples])
    )
