"""``offramp predict``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.artifact import open_artifact
from offramp.cli.options import DeviceOption, RunOrBundle, percent

if TYPE_CHECKING:
    from torch import Tensor

    from offramp.training.recipes import Recipe


def predict(
    run: RunOrBundle,
    samples: Annotated[
        list[str], typer.Argument(metavar="FILE|TEXT...", help="Upright images, or sentences.")
    ],
    device: DeviceOption = None,
) -> None:
    """Print label, confidence, exit, blocks or tokens, and share of the plain network's MACs."""
    asked = open_artifact(run, device)
    names = asked.class_names
    inputs = _read_samples(samples, asked.recipe).to(asked.device)
    result = asked.runner.run(inputs)
    for position, sample in enumerate(samples):
        label = _named(result.output[position], names)
        plain_macs = asked.plain_macs(inputs[position : position + 1])
        way = f"exit {int(result.exit_index[position])}"
        if result.blocks is not None:
            blocks = result.blocks[position]
            way = f"{int(blocks.sum())} of {len(blocks)} gated blocks"
        if result.tokens is not None:
            tokens = result.tokens[position]
            depth = int(tokens.sum()) / max(1, int(tokens[0]))
            way = f"{depth:.2f} of {len(tokens)} layers a token"
        print(
            f"{sample}: {label}  confidence {float(result.confidence[position]):.3f}  {way}  "
            f"{percent(int(result.macs[position]) / plain_macs)} of the plain network's MACs"
        )


_MOST_NAMED = 3
"""So many classes of an image are named, where every pixel has one."""


def _named(output: Any, names: tuple[str, ...]) -> str:
    """The label that logits say; where they are of pixels, those of most of them."""
    import torch

    logits = torch.as_tensor(output)

    def name(index: int) -> str:
        return names[index] if index < len(names) else str(index)

    if logits.ndim == 1:
        return name(int(logits.argmax()))
    counts_C = torch.bincount(logits.argmax(0).flatten(), minlength=len(logits))
    most = counts_C.argsort(descending=True)[:_MOST_NAMED].tolist()
    shares = (counts_C / counts_C.sum()).tolist()
    return ", ".join(f"{name(index)} {percent(shares[index])}" for index in most if shares[index])


def _read_samples(samples: list[str], recipe: Recipe) -> Tensor:
    """Bring image files, or sentences, into the form that the recipe's network takes."""
    import torch

    from offramp.inference.pictures import read_picture
    from offramp.training.sources import SOURCES
    from offramp.training.text import encode_padded
    from offramp.zoo.text import load_tokenizer

    source = SOURCES[recipe.data]
    if source.image_shape is None:
        return encode_padded(load_tokenizer(), samples)
    return recipe.require_normalisation()(
        torch.stack([read_picture(file, source) for file in samples])
    )
