"""``offramp show``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.artifacts import atomic_path
from offramp.cli.artifact import is_bundle
from offramp.cli.options import DeviceOption, RunFolder, pick_device
from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from offramp.inference.halting import HaltingRunner
    from offramp.training.run import Run


def show(
    run: RunFolder,
    image: Annotated[Path, typer.Option(metavar="FILE", help="An upright image.")],
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="To write; default FILE-depth.png, here.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Draw how many layers each patch of an image runs before its token halts."""
    path = Path(f"{image.stem}-depth.png") if out is None else out
    if path.suffix.lower() != ".png":
        raise InvalidArgumentError(f"--out must name a .png file. Got {path}.")
    if is_bundle(run):
        raise InvalidArgumentError(
            f"{run} is a bundle, which does not say how far each token went. Give the run that it "
            "was exported from."
        )
    from offramp.training.run import load

    loaded = load(run)
    _draw(loaded, _runner_of(loaded, pick_device(device)), image, path)


def _runner_of(loaded: Run, device: str) -> HaltingRunner:
    from offramp.inference.halting import HaltingRunner
    from offramp.inference.runner import make_runner
    from offramp.training.sources import SOURCES

    recipe = loaded.require_recipe()
    runner = make_runner(loaded.network.to(device), loaded.policy)
    if not isinstance(runner, HaltingRunner):
        raise InvalidArgumentError(
            f"Expected a run whose tokens halt, such as emnist-avit's: how far they go is drawn. "
            f"{loaded.folder} is of {recipe.name}, which has none to draw."
        )
    if SOURCES[recipe.data].image_shape is None:
        raise InvalidArgumentError(
            f"Expected a run on images. {loaded.folder} is of {recipe.name}, which reads texts."
        )
    return runner


def _draw(loaded: Run, runner: HaltingRunner, image: Path, path: Path) -> None:
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
    with torch.inference_mode():
        depth_T = runner.network(inputs, threshold=runner.policy.threshold).depth[0].cpu()
    grid = depth_T[1:].reshape(patch_grid(len(depth_T) - 1, *pixels_CHW.shape[1:]))
    if source.transposed:
        pixels_CHW, grid = pixels_CHW.transpose(1, 2), grid.T
    colours = pixels_CHW.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
    sheet = draw_depths(Image.fromarray(colours), grid.numpy(), runner.network.num_layers)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    index = int(result.output[0].argmax())
    label = loaded.class_names[index] if index < len(loaded.class_names) else str(index)
    assert result.tokens is not None  # its tokens halt
    per_layer = " ".join(str(count) for count in result.tokens[0].tolist())
    print(
        f"{image}: {label}  confidence {float(result.confidence[0]):.3f}  mean depth "
        f"{float(grid.double().mean()):.2f} of {runner.network.num_layers} layers"
    )
    print(f"tokens in each layer: {per_layer}")
    print(f"drawn in {path}")
