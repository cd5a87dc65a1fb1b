"""``offramp train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from offramp.cli.options import Train
from offramp.errors import ArtifactError, InvalidArgumentError, reason
from offramp.model.checkpoint import save_weights
from offramp.recipes.exits import find_recipe
from offramp.recipes.recipe import Recipe
from offramp.recipes.settings import override
from offramp.runs import run as run_folder
from offramp.training.allocator import keep_freed_memory
from offramp.training.config_checks import check_class_weights, check_config
from offramp.training.fit import fit
from offramp.training.last_checkpoint import LAST_CHECKPOINT, check_checkpoint
from offramp.workflow.artifact import pick_device
from offramp.zoo import Network


def train(asked: Train) -> None:
    """Train a recipe, or go on with it."""
    keep_freed_memory()
    recipe = override(find_recipe(asked.recipe), _settings(asked))
    where = pick_device(asked.device)
    config = replace(recipe.config_as_trained(), device=where)  # type: ignore[arg-type]
    network = recipe.build_network()
    folder, data = asked.out or Path("runs") / asked.recipe, asked.data
    is_going_on = asked.resume and (folder / run_folder.RECIPE_FILE).exists()
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
    fit(network, train_set, calibration_set, config, folder=folder, resume=asked.resume)
    save_weights(network, folder / run_folder.WEIGHTS_FILE)
    print(f"trained {asked.recipe}: {folder}")


def _settings(asked: Train) -> dict[str, str]:
    """The settings to change, by name; options win over ``--set``."""
    pairs = {}
    for setting in asked.settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InvalidArgumentError(f"Expected --set key=value. Got {setting!r}.")
        pairs[key.strip()] = value.strip()
    flags = {"epochs": asked.epochs, "seed": asked.seed}
    return pairs | {name: str(value) for name, value in flags.items() if value is not None}


def _check_begun(folder: Path, recipe: Recipe, network: Network) -> str | None:
    """Make sure that a run can go on; the data that it was started with."""
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
