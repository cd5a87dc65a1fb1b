"""Write the logits of every exit of a run on test images, for benchmarks of choosing when to stop.

They are a pool of samples that no training has seen: benchmarks/thresholds.py and
benchmarks/guarantee.py draw calibration and test sets from it. With --train, those of images that
it was trained on, as many of each class as of any other where the recipe's prior is uniform:
benchmarks/guarantee.py finds fronts on them. Half precision; a random subset, so that the file
stays small.

    OFFRAMP_DATA=... python benchmarks/cache_logits.py RUN [--num-samples 12500] [--out FILE]
    OFFRAMP_DATA=... python benchmarks/cache_logits.py RUN --train --num-samples 10000
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from offramp import collect, load
from offramp.calibration.collect import write_logits
from offramp.data.images import Batches, make_loader, split_off_calibration
from offramp.runs.run import load_batches
from pools import front_file, pool_file

SEED = 0


def some_of(batches: Batches, num_samples: int, *, evenly: bool) -> Batches:
    """A random part of the samples, not augmented; as many of each class if asked."""
    if evenly:
        share = num_samples / len(batches)
        return split_off_calibration(batches, share=share, seed=SEED, uniform_prior=True)[1]
    chosen = np.random.default_rng(SEED).permutation(len(batches))[:num_samples]
    return batches.subset(torch.from_numpy(np.sort(chosen))).unaugmented()


def main(
    run: Annotated[Path, typer.Argument(help="A trained run folder.")],
    num_samples: Annotated[int, typer.Option(min=1, help="At most so many.")] = 12_500,
    out: Annotated[Path | None, typer.Option(help="Default: benchmarks/logits/RUN.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Images it was trained on.")] = False,
    data: Annotated[str | None, typer.Option(help="Folder with SPLIT.parquet.")] = None,
) -> None:
    loaded = load(run)
    recipe, split = loaded.require_recipe(), "train" if train else "test"
    batches, _, _ = load_batches(recipe, split, data or loaded.data)
    chosen = some_of(batches, num_samples, evenly=train and recipe.uniform_prior)
    path = out or (front_file if train else pool_file)(run.name)
    write_logits(path, collect(loaded.network, make_loader(chosen, batch_size=256)))
    print(f"{len(chosen):,} of {len(batches):,} {split} images: {path}")


if __name__ == "__main__":
    typer.run(main)
