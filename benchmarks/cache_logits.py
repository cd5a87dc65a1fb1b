"""Write the logits of every exit of a run on test images, for benchmarks of choosing when to stop.

They are a pool of samples that no training has seen: benchmarks/thresholds.py and
benchmarks/guarantee.py draw calibration and test sets from it. Half precision; a random subset, so
that the file stays small.

    OFFRAMP_DATA=... python benchmarks/cache_logits.py RUN [--num-samples 12500] [--out FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from offramp import collect, load
from offramp.calibration.collect import write_logits
from offramp.training.data import make_loader
from offramp.training.run import load_batches
from pools import pool_file

SEED = 0


def main(
    run: Annotated[Path, typer.Argument(help="A trained run folder.")],
    num_samples: Annotated[int, typer.Option(min=1, help="At most so many.")] = 12_500,
    out: Annotated[Path | None, typer.Option(help="Default: benchmarks/logits/RUN.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with test.parquet.")] = None,
) -> None:
    loaded = load(run)
    batches, _, _ = load_batches(loaded.require_recipe(), "test", data or loaded.data)
    logits = collect(loaded.network, make_loader(batches, batch_size=256))
    chosen = np.random.default_rng(SEED).permutation(len(batches))[:num_samples]
    path = out or pool_file(run.name)
    write_logits(path, logits.take(np.sort(chosen)))
    print(f"{len(chosen):,} of {len(batches):,} test images: {path}")


if __name__ == "__main__":
    typer.run(main)
