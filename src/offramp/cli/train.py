"""``offramp train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from offramp.cli.options import Train
from offramp.data.folders import splits_below
from offramp.data.images import Batches, in_tensors
from offramp.data.own import class_names_in, load_own
from offramp.errors import ArtifactError, DataNotFoundError, InvalidArgumentError, reason
from offramp.measure.outputs import MAPS
from offramp.model.checkpoint import save_weights
from offramp.model.multi_exit import as_features
from offramp.recipes.exits import find_recipe
from offramp.recipes.recipe import Recipe
from offramp.recipes.settings import override, override_fit
from offramp.runs import run as run_folder
from offramp.runs.own_network import OwnFile, build_own, num_inputs_of, read_own_file
from offramp.runs.run import OwnTraining
from offramp.runtime.preprocessing import TextPreprocessing
from offramp.training.allocator import keep_freed_memory
from offramp.training.config import FitConfig
from offramp.training.config_checks import check_class_weights, check_config
from offramp.training.fit import fit
from offramp.training.last_checkpoint import LAST_CHECKPOINT, check_checkpoint
from offramp.workflow.artifact import pick_device
from offramp.workflow.samples import CALIBRATION
from offramp.zoo import Network

_DEFAULT = "digits-mlp"
"""The recipe where none is named."""
_Begun = tuple[Recipe | None, tuple[str, ...], str | None]
"""Recipe, class names and data of a run."""


def train(asked: Train) -> None:
    """Train a recipe, or a network of the user's own; or go on with it."""
    keep_freed_memory()
    if asked.network is None:
        _train_recipe(asked, asked.recipe or _DEFAULT)
    else:
        _train_own(asked, read_own_file(asked.network))


def _train_recipe(asked: Train, name: str) -> None:
    recipe = override(find_recipe(name), _settings(asked))
    config = _on_device(recipe.config_as_trained(), asked.device)
    network = recipe.build_network()
    folder, data = asked.out or Path("runs") / name, asked.data
    begun = _begun(asked, folder)
    if begun is not None:
        _require_same(folder, begun[0] == recipe)
        if _is_trained(folder, network):
            return
        data = data or begun[2]
    data = _from_anywhere(data)
    train_set, calibration_set, class_names = run_folder.load_training_data(recipe, data)
    check_config(network, config)
    check_class_weights(config.class_weights, num_classes=len(class_names))
    _check_fit(network, train_set)
    if begun is None:
        run_folder.create_folder(folder)
        run_folder.write_recipe(folder, recipe=recipe, class_names=class_names, data=data)
    _fit(network, train_set, calibration_set, config, folder, asked)
    print(f"trained {name}: {folder}")


def _train_own(asked: Train, file: OwnFile) -> None:
    preprocessing, data = file.require_preprocessing(), _from_anywhere(asked.data)
    assert data is not None  # the options say so
    folder = asked.out or Path("runs") / file.path.stem
    begun = _begun(asked, folder)
    splits = splits_below(Path(data))
    if "train" not in splits:
        raise DataNotFoundError(
            f"Expected a split train in {data}, and beside it one of {', '.join(CALIBRATION)}. It "
            f"has {', '.join(splits)}."
        )
    held_out = next((split for split in CALIBRATION if split in splits), None)
    is_text = isinstance(preprocessing, TextPreprocessing)
    class_names = class_names_in(data, "train", is_text=is_text)
    training = OwnTraining(
        num_classes=len(class_names),
        num_exits=asked.exits,
        fit=override_fit(FitConfig(), _settings(asked)),
    )
    network = build_own(file, training, preprocessing)
    if network.outputs.name == MAPS.name:
        raise InvalidArgumentError(
            f"The network of {file} says a class for every pixel: train it in Python, with fit and "
            "export."
        )
    if begun is not None:
        same = run_folder.read_own(folder) == training and begun[1] == class_names
        _require_same(folder, same)
        if _is_trained(folder, network):
            return
    train_set, calibration_set = (
        None
        if split is None
        else in_tensors(
            load_own(
                data,
                split,
                preprocessing,
                class_names=class_names,
                num_classes=len(class_names),
                num_inputs=num_inputs_of(network),
            ).batches
        )
        for split in ("train", held_out)
    )
    assert train_set is not None
    config = _on_device(training.fit, asked.device)
    check_config(network, config)
    _check_fit(network, train_set)
    if begun is None:
        run_folder.create_folder(folder)
        run_folder.write_recipe(
            folder,
            recipe=None,
            class_names=class_names,
            data=data,
            preprocessing=preprocessing,
            own=training,
        )
    _fit(network, train_set, calibration_set, config, folder, asked)
    print(f"trained {file}: {folder}")


def _fit(
    network: Network,
    train_set: Batches,
    calibration_set: Batches | None,
    config: FitConfig,
    folder: Path,
    asked: Train,
) -> None:
    fit(network, train_set, calibration_set, config, folder=folder, resume=asked.resume)
    save_weights(network, folder / run_folder.WEIGHTS_FILE)


def _on_device(config: FitConfig, device: str | None) -> FitConfig:
    return replace(config, device=pick_device(device))  # type: ignore[arg-type]


def _from_anywhere(data: str | None) -> str | None:
    """Name data so that it is found from other folders too."""
    return str(Path(data).resolve()) if data is not None and Path(data).exists() else data


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


def _begun(asked: Train, folder: Path) -> _Begun | None:
    """Read what a run was begun with; None for a new one, whose folder must be free."""
    if asked.resume and (folder / run_folder.RECIPE_FILE).exists():
        return run_folder.read_recipe(folder)
    run_folder.require_new(folder)
    return None


def _require_same(folder: Path, is_same: bool) -> None:
    if not is_same:
        raise ArtifactError(
            f"The run {folder} was started with other settings. Resume it with those, or "
            "choose another folder with --out."
        )


def _is_trained(folder: Path, network: Network) -> bool:
    """True if nothing is left to do; else make sure that a run can go on."""
    if (folder / run_folder.WEIGHTS_FILE).exists():
        print(f"{folder} is trained to the end already")
        return True
    if (folder / LAST_CHECKPOINT).exists():
        check_checkpoint(folder / LAST_CHECKPOINT, network)
    return False


def _check_fit(network: Network, train_set: Batches) -> None:
    inputs, _ = train_set.__getitems__([0])
    try:
        network.costs(*as_features(inputs))
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(tensor.shape[1:])) for tensor in as_features(inputs))
        raise InvalidArgumentError(
            f"The network does not fit the data's samples of shape {shapes}: "
            f"{reason(error)}. Change its options with --set."
        ) from error
