"""``offramp recipes`` and ``offramp train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.options import DataOption, DeviceOption, parse_settings
from offramp.errors import ArtifactError, InvalidArgumentError, reason
from offramp.workflow.artifact import pick_device

if TYPE_CHECKING:
    from torch import Tensor

    from offramp.recipes.recipe import Recipe
    from offramp.zoo import Network


def recipes() -> None:
    """List the recipes: network, data, what each shows, figures to expect."""
    from offramp.recipes.exits import RECIPES

    for recipe in RECIPES.values():
        print(f"{recipe.name}\n  {recipe.summary}")
        print(f"  network {recipe.network}, data {recipe.data}; expect {recipe.expected}")


def train(
    recipe_name: Annotated[str, typer.Argument(metavar="RECIPE")] = "digits-mlp",
    data: DataOption = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder to make; default runs/RECIPE.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of weights, order and augmentation; default 0.")
    ] = None,
    device: DeviceOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after an interruption.")] = False,
) -> None:
    """Train a recipe and leave a run folder."""
    from offramp.model.checkpoint import save_weights
    from offramp.recipes.exits import find_recipe
    from offramp.recipes.settings import override
    from offramp.runs import run as run_folder
    from offramp.training.allocator import keep_freed_memory
    from offramp.training.config_checks import check_class_weights, check_config
    from offramp.training.fit import fit

    keep_freed_memory()
    flags = {"epochs": epochs, "seed": seed}
    asked = parse_settings(settings or [])
    asked |= {name: str(value) for name, value in flags.items() if value is not None}
    recipe = override(find_recipe(recipe_name), asked)
    config = replace(recipe.config_as_trained(), device=pick_device(device))  # type: ignore[arg-type]
    network = recipe.build_network()
    folder = out or Path("runs") / recipe_name
    is_going_on = resume and (folder / run_folder.RECIPE_FILE).exists()
    if is_going_on:
        begun_data = _check_begun(folder, recipe, network)
        data = data or begun_data
        if (folder / run_folder.WEIGHTS_FILE).exists():
            print(f"{folder} is trained to the end already")
            return
    else:
        run_folder.require_new(folder)
    if data is not None and Path(data).is_dir():
        data = str(Path(data).resolve())  # to be found from other folders too
    train_set, calibration_set, class_names = run_folder.load_training_data(recipe, data)
    check_config(network, config)
    check_class_weights(config.class_weights, num_classes=len(class_names))
    _check_fit(network, train_set[0][0])
    if not is_going_on:
        run_folder.create_folder(folder)
        run_folder.write_recipe(folder, recipe=recipe, class_names=class_names, data=data)
    fit(network, train_set, calibration_set, config, folder=folder, resume=resume)
    save_weights(network, folder / run_folder.WEIGHTS_FILE)
    print(f"trained {recipe_name}: {folder}")


def _check_begun(folder: Path, recipe: Recipe, network: Network) -> str | None:
    """Make sure that a run can go on; the data that it was started with."""
    from offramp.runs import run as run_folder
    from offramp.training.last_checkpoint import LAST_CHECKPOINT, check_checkpoint

    begun, _, data = run_folder.read_recipe(folder)
    if begun != recipe:
        raise ArtifactError(
            f"The run {folder} was started with other settings. Resume it with those, or "
            "choose another folder with --out."
        )
    is_trained = (folder / run_folder.WEIGHTS_FILE).exists()
    if not is_trained and (folder / LAST_CHECKPOINT).exists():
        check_checkpoint(folder / LAST_CHECKPOINT, network)
    return data


def _check_fit(network: Network, sample: Tensor) -> None:
    try:
        network.costs(sample[None])
    except RuntimeError as error:
        raise InvalidArgumentError(
            f"The network does not fit the data's samples of shape {tuple(sample.shape)}: "
            f"{reason(error)}. Change its options with --set."
        ) from error
