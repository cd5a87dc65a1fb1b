"""``offramp show``: a picture of what a run says of an image, and of what it took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from offramp.artifacts import atomic_path
from offramp.cli.options import Show
from offramp.data.fitted_pictures import read_picture
from offramp.data.sources import SOURCES
from offramp.drawing.exit_maps import draw_sheet, exit_maps
from offramp.drawing.token_depths import draw_depths, patch_grid
from offramp.errors import InvalidArgumentError
from offramp.families import family_of, make_runner
from offramp.families.exits import all_exits_loop
from offramp.runs.run import Run, load
from offramp.runtime.bundle import is_bundle
from offramp.workflow.artifact import answer_run, pick_device


def show(asked: Show) -> None:
    """Draw what a run says of an image."""
    if is_bundle(asked.run):
        raise InvalidArgumentError(
            f"{asked.run} is a bundle, which answers and keeps the rest to itself. Give the run "
            "that it was exported from."
        )
    loaded = load(asked.run)
    draw, what = _DRAWINGS[loaded.network.outputs.name]
    path = asked.out or Path(f"{asked.image.stem}-{what}.png")
    draw(loaded, asked.image, path, asked.device)
    print(f"drawn in {path}")


def _require_depths(loaded: Run) -> Callable[..., Tensor]:
    """The depths of tokens, where they halt on images."""
    recipe, depths = loaded.require_recipe(), family_of(loaded.network).depths
    if depths is None:
        raise InvalidArgumentError(
            "Expected a run whose tokens halt, such as emnist-avit's, or one that says a class for "
            f"every pixel, such as camvid-seg's. {loaded.folder} is of {recipe.name}, of which "
            "there is nothing to draw: use offramp predict."
        )
    if SOURCES[recipe.data].image_shape is None:
        raise InvalidArgumentError(
            f"Expected a run on images. {loaded.folder} is of {recipe.name}, which reads texts."
        )
    return depths


def _draw_depths(loaded: Run, image: Path, path: Path, device: str | None) -> None:

    recipe, depths = loaded.require_recipe(), _require_depths(loaded)
    source, where = SOURCES[recipe.data], pick_device(device)
    pixels_CHW = read_picture(image, source)
    inputs = recipe.require_normalisation()(pixels_CHW[None]).to(where)
    runner = make_runner(loaded.network.to(where), loaded.policy)
    result = runner.run(inputs)
    depth_T = depths(runner.network, runner.policy, inputs)[0].cpu()
    grid = depth_T[1:].reshape(patch_grid(len(depth_T) - 1, *pixels_CHW.shape[1:]))
    if source.transposed:
        pixels_CHW, grid = pixels_CHW.transpose(1, 2), grid.T
    colours = pixels_CHW.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
    num_layers = result.work.shape[1]
    sheet = draw_depths(Image.fromarray(colours), grid.numpy(), num_layers)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    (answer,) = answer_run(runner.network, runner.policy, loaded.class_names, inputs)
    per_layer = " ".join(str(count) for count in result.work[0].tolist())
    print(f"{image}: {answer}")
    print(f"tokens in each layer: {per_layer}")


def _draw_exits(loaded: Run, image: Path, path: Path, device: str | None) -> None:

    recipe = loaded.require_recipe()
    network = loaded.multi_exit.to(pick_device(device))
    runner = make_runner(network, loaded.policy)
    pixels_CHW = read_picture(image, SOURCES[recipe.data])
    where = next(network.parameters()).device
    inputs = recipe.require_normalisation()(pixels_CHW[None]).to(where)
    with torch.no_grad():
        _, chosen_B, confidence_KB = all_exits_loop(network, runner.policy, inputs)
        outputs = network(inputs)
    sheet = draw_sheet(
        pixels_CHW.numpy(),
        exit_maps(runner.policy, outputs, confidence_KB[:, 0], int(chosen_B[0])),
        loaded.class_names,
        pixel_threshold=getattr(runner.policy, "pixel_threshold", 0.9),
    )
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    (answer,) = answer_run(network, runner.policy, loaded.class_names, inputs)
    print(f"{image}: {answer}")


_DRAWINGS = {"labels": (_draw_depths, "depth"), "maps": (_draw_exits, "exits")}
"""By the name of a network's outputs, what is drawn of it, and how its file's name ends."""
