"""``offramp show``: a picture of what a run says of an image, and of what it took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.artifacts import atomic_path
from offramp.cli.options import DeviceOption, RunFolder
from offramp.errors import InvalidArgumentError
from offramp.workflow.artifact import answer_run, is_bundle, pick_device

if TYPE_CHECKING:
    from offramp.inference.halting import HaltingRunner
    from offramp.training.run import Run


def show(
    run: RunFolder,
    image: Annotated[Path, typer.Option(metavar="FILE", help="An upright image.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="To write; default FILE-depth.png or -exits.png, here."),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Draw an image: layers before each token halts, or each exit's map of classes."""
    if out is not None and out.suffix.lower() != ".png":
        raise InvalidArgumentError(f"--out must name a .png file. Got {out}.")
    if is_bundle(run):
        raise InvalidArgumentError(
            f"{run} is a bundle, which answers and keeps the rest to itself. Give the run that it "
            "was exported from."
        )
    from offramp.model.multi_exit import MultiExitNetwork
    from offramp.training.run import load

    loaded = load(run)
    if isinstance(loaded.network, MultiExitNetwork) and loaded.network.is_dense:
        path = out or Path(f"{image.stem}-exits.png")
        _draw_exits(loaded, image, path, device)
    else:
        path = out or Path(f"{image.stem}-depth.png")
        _draw_depths(loaded, _runner_of(loaded, pick_device(device)), image, path)
    print(f"drawn in {path}")


def _runner_of(loaded: Run, device: str) -> HaltingRunner:
    from offramp.inference.halting import HaltingRunner
    from offramp.inference.runner import make_runner
    from offramp.routing.halting import HaltingNetwork
    from offramp.training.sources import SOURCES

    recipe = loaded.require_recipe()
    if not isinstance(loaded.network, HaltingNetwork):
        raise InvalidArgumentError(
            "Expected a run whose tokens halt, such as emnist-avit's, or one that says a class for "
            f"every pixel, such as camvid-seg's. {loaded.folder} is of {recipe.name}, of which "
            "there is nothing to draw: use offramp predict."
        )
    if SOURCES[recipe.data].image_shape is None:
        raise InvalidArgumentError(
            f"Expected a run on images. {loaded.folder} is of {recipe.name}, which reads texts."
        )
    runner = make_runner(loaded.network.to(device), loaded.policy)
    assert isinstance(runner, HaltingRunner)  # its tokens halt
    return runner


def _draw_depths(loaded: Run, runner: HaltingRunner, image: Path, path: Path) -> None:
    import torch
    from PIL import Image

    from offramp.inference.depth_maps import draw_depths, patch_grid
    from offramp.inference.pictures import read_picture
    from offramp.training.sources import SOURCES

    recipe = loaded.require_recipe()
    source = SOURCES[recipe.data]
    pixels_CHW = read_picture(image, source)
    device = next(runner.network.parameters()).device
    inputs = recipe.require_normalisation()(pixels_CHW[None]).to(device)
    result = runner.run(inputs)
    with torch.no_grad():
        depth_T = runner.network(inputs, threshold=runner.policy.threshold).depth[0].cpu()
    grid = depth_T[1:].reshape(patch_grid(len(depth_T) - 1, *pixels_CHW.shape[1:]))
    if source.transposed:
        pixels_CHW, grid = pixels_CHW.transpose(1, 2), grid.T
    colours = pixels_CHW.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
    sheet = draw_depths(Image.fromarray(colours), grid.numpy(), runner.network.num_layers)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    (answer,) = answer_run(runner.network, runner.policy, loaded.class_names, inputs)
    assert result.tokens is not None  # its tokens halt
    per_layer = " ".join(str(count) for count in result.tokens[0].tolist())
    print(f"{image}: {answer}")
    print(f"tokens in each layer: {per_layer}")


def _draw_exits(loaded: Run, image: Path, path: Path, device: str | None) -> None:
    import torch

    from offramp.inference.agreement import all_exits_loop
    from offramp.inference.pictures import read_picture
    from offramp.inference.runner import AdaptiveRunner, make_runner
    from offramp.inference.sheets import draw_sheet, exit_maps
    from offramp.training.sources import SOURCES

    recipe = loaded.require_recipe()
    network = loaded.multi_exit.to(pick_device(device))
    runner = make_runner(network, loaded.policy)
    assert isinstance(runner, AdaptiveRunner)  # of a network with exits
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
