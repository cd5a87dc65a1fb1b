"""Do tokens on blank paper halt earlier than tokens on ink?

RUN is a run of a vision transformer whose tokens halt, for grey images of light ink on dark. Every
test image is run with the run's threshold; a patch's ink is the mean of its pixels, 0 to 1. Printed
are the mean depth by ink, of the patches of the border that are blank, and the difference between
an image's patches on ink and its blank ones, over images: its mean, and a t test of zero.

    OFFRAMP_DATA=... python benchmarks/ink_depth.py RUN [--json FILE]
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from offramp import load
from offramp.drawing.token_depths import patch_grid
from offramp.routing.halting import HaltingNetwork
from offramp.runs.run import load_batches
from record import circumstances, write_json

INK_EDGES = (0.0, 0.001, 0.1, 0.3, 0.6, 1.0)
"""Between them lie the groups that are printed; the first is blank."""


def depth_and_ink(
    network: HaltingNetwork, threshold: float, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Layers that each patch ran, and its ink, both of shape (N, rows, columns)."""
    with torch.no_grad():
        depths = [network(part, threshold=threshold).depth[:, 1:] for part in images.split(256)]
    depth_NP = torch.cat(depths)
    rows, columns = patch_grid(depth_NP.shape[1], *images.shape[2:])
    lightest, darkest = images.max(), images.min()
    grey = (images - darkest) / (lightest - darkest)
    ink_N1RS = F.avg_pool2d(grey, (images.shape[2] // rows, images.shape[3] // columns))
    return depth_NP.reshape(-1, rows, columns).double(), ink_N1RS[:, 0].double()


def mean_by_ink(depth: Tensor, ink: Tensor) -> list[dict[str, float]]:
    """Mean depth of the patches whose ink lies between two edges, the lower one counted."""
    rows = []
    for low, high in pairwise(INK_EDGES):
        here = (ink >= low) & ((ink < high) | (high == INK_EDGES[-1]))
        share, depth_here = float(here.double().mean()), float(depth[here].mean())
        rows.append({"from": low, "to": high, "share": share, "mean_depth": depth_here})
    return rows


def difference(depth: Tensor, ink: Tensor) -> dict[str, float]:
    """How much deeper an image's patches on ink run than its blank ones, over images."""
    is_blank = ink < INK_EDGES[1]
    blank_N, inked_N = (
        (depth * where).sum((1, 2)) / where.sum((1, 2)) for where in (is_blank, ~is_blank)
    )
    gaps_N = (inked_N - blank_N)[is_blank.flatten(1).any(1) & ~is_blank.flatten(1).all(1)]
    error = float(gaps_N.std() / len(gaps_N) ** 0.5)
    mean = float(gaps_N.mean())
    return {"images": len(gaps_N), "mean": mean, "standard_error": error, "t": mean / error}


def border_of(grid: Tensor) -> Tensor:
    """The outermost patches, shape (N, patches)."""
    is_border = torch.ones(grid.shape[1:], dtype=torch.bool)
    is_border[1:-1, 1:-1] = False
    return grid[:, is_border]


def main(
    run: Annotated[Path, typer.Argument(help="A run of a vision transformer whose tokens halt.")],
    data: Annotated[str | None, typer.Option(help="Folder with the Parquet files.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    loaded = load(run)
    if not isinstance(loaded.network, HaltingNetwork):
        raise typer.BadParameter(f"expected a run whose tokens halt; got {run}")
    batches, _, _ = load_batches(loaded.require_recipe(), "test", data or loaded.data)
    images, _ = batches.__getitems__(range(len(batches)))
    depth, ink = depth_and_ink(loaded.network, loaded.policy.threshold, images)
    groups = mean_by_ink(depth, ink)
    for group in groups:
        print(
            f"ink {group['from']:.3f} to {group['to']:.3f}: {100 * group['share']:4.1f} % of the "
            f"patches, mean depth {group['mean_depth']:.2f}"
        )
    border, border_ink = border_of(depth), border_of(ink)
    blank_border = float(border[border_ink < INK_EDGES[1]].mean())
    print(f"blank patches of the border: mean depth {blank_border:.2f}")
    gap = difference(depth, ink)
    print(
        f"on ink deeper than on blank paper by {gap['mean']:.2f} layers, standard error "
        f"{gap['standard_error']:.3f}, over {gap['images']} images (t = {gap['t']:.0f})"
    )
    if json_file is not None:
        figures = {"by_ink": groups, "blank_border": blank_border, "difference": gap}
        settings = {"run": run.name, "threshold": loaded.policy.threshold}
        write_json({**circumstances(), **settings, **figures}, json_file)


if __name__ == "__main__":
    typer.run(main)
