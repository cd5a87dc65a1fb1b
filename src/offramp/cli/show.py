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
from offramp.data.preprocessing import normalised, read_pixels
from offramp.data.sources import SOURCES
from offramp.drawing.exit_maps import ExitMap, draw_sheet, exit_maps
from offramp.drawing.token_depths import draw_depths, patch_grid
from offramp.errors import InvalidArgumentError
from offramp.families import family_of, make_runner
from offramp.families.exits import all_exits_loop
from offramp.runs.run import Run, load
from offramp.runtime import Session
from offramp.runtime.bundle import is_bundle
from offramp.runtime.preprocessing import Preprocessing
from offramp.workflow.artifact import pick_device
from offramp.workflow.opened_run import answer_run
from offramp.workflow.predict import predict
from offramp.workflow.preprocessing import preprocessing_of
from offramp.workflow.samples import says_maps


def show(asked: Show) -> None:
    """Draw what a run says of an image."""
    if is_bundle(asked.run):
        path = asked.out or Path(f"{asked.image.stem}-exits.png")
        _draw_bundle(asked.run, asked.image, path)
        print(f"drawn in {path}")
        return
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


def _draw_bundle(folder: Path, image: Path, path: Path) -> None:
    session = Session(folder)
    bundle = session.bundle
    if not says_maps(bundle):
        raise InvalidArgumentError(
            f"{folder} is a bundle that says one class for a sample, and of these it has nothing "
            "to draw: use offramp predict. Give the run that it was exported from for the depths "
            "of tokens."
        )
    preprocessing, _ = preprocessing_of(bundle)
    assert isinstance(preprocessing, Preprocessing)
    pixels_CHW = read_pixels(image, preprocessing)
    inputs = normalised(pixels_CHW[None], preprocessing)
    maps: list[ExitMap] = []
    carried = [inputs]
    for index, step in enumerate(bundle.steps):
        _, (output, confidence_B, leave_B, *carried) = session.run_step(index, carried)
        taken = bool(leave_B[0]) and not any(each.is_taken for each in maps)
        maps.append(
            ExitMap(
                exit_index=step.exit_index,
                logits_Chw=torch.from_numpy(output[0]) / step.temperature,
                confidence=float(confidence_B[0]),
                is_taken=taken,
            )
        )
    pixel_threshold = float(bundle.policy.get("pixel_threshold") or 0.9)
    sheet = draw_sheet(pixels_CHW, maps, bundle.class_names, pixel_threshold=pixel_threshold)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    (answer,) = predict(folder, [str(image)]).answers
    print(f"{image}: {answer}")


_DRAWINGS = {"labels": (_draw_depths, "depth"), "maps": (_draw_exits, "exits")}
"""By the name of a network's outputs, what is drawn of it, and how its file's name ends."""
