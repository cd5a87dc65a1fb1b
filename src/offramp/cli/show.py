"""``offramp show``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.artifacts import atomic_path
from offramp.cli.artifact import is_bundle
from offramp.cli.options import DeviceOption, RunFolder, percent, pick_device
from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from offramp.training.run import Run


def show(
    run: RunFolder,
    image: Annotated[Path, typer.Option(metavar="FILE", help="An upright image.")],
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="To write; default FILE-exits.png, here.")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Draw an image beside each exit's map of classes, its sure pixels, and the exit taken."""
    path = Path(f"{image.stem}-exits.png") if out is None else out
    if path.suffix.lower() != ".png":
        raise InvalidArgumentError(f"--out must name a .png file. Got {path}.")
    if is_bundle(run):
        raise InvalidArgumentError(
            f"{run} is a bundle, which says what one exit answers. Give the run that it was "
            "exported from."
        )
    from offramp.training.run import load

    loaded = load(run)
    if not loaded.multi_exit.is_dense:
        raise InvalidArgumentError(
            "Expected a run of a network that says a class for every pixel, such as camvid-seg's. "
            f"{run} says one for an image: use offramp predict."
        )
    show_exits(loaded, image, path, device)


def show_exits(loaded: Run, image: Path, path: Path, device: str | None) -> None:
    """Draw what each exit of a segmentation network says of an image.

    Args:
        loaded: The run.
        image: The image's file.
        path: The PNG file to write.
        device: Where to compute.
    """
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
    with torch.inference_mode():
        _, chosen_B, confidence_KB = all_exits_loop(network, runner.policy, inputs)
        outputs = network(inputs)
    result = runner.run(inputs)
    sheet = draw_sheet(
        pixels_CHW.numpy(),
        exit_maps(outputs, confidence_KB[:, 0], int(chosen_B[0])),
        loaded.class_names,
        pixel_threshold=getattr(runner.policy, "pixel_threshold", 0.9),
    )
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    share = int(result.macs[0]) / network.costs(inputs).plain_macs
    print(
        f"{image}: exit {int(result.exit_index[0])}  confidence {float(result.confidence[0]):.3f}  "
        f"{percent(share)} of the plain network's MACs"
    )
    print(f"drawn in {path}")
