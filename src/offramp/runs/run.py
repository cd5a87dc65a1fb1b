"""The run folder: a recipe, the weights it led to, and the policy chosen for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from offramp.artifacts import read_json, write_json
from offramp.data.arrays import TextArrays
from offramp.data.images import Batches, ImageBatches, TensorBatches, split_off_calibration
from offramp.data.label_range import check_labels
from offramp.data.masks import MaskBatches
from offramp.data.sources import load_split
from offramp.data.splits import Split, TextSplit, known_labels
from offramp.data.texts import PAD_ID
from offramp.decoding import decode
from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.families import family_of
from offramp.model.checkpoint import load_weights, save_weights
from offramp.model.multi_exit import MultiExitNetwork
from offramp.policy.as_dict import policy_from_dict, policy_to_dict
from offramp.policy.policies import Policy
from offramp.policy.routing_policy import RoutingPolicy
from offramp.policy.rules import RULES
from offramp.recipes.recipe import Recipe
from offramp.runtime.chosen_on import CALIBRATION_SPLIT as CALIBRATION_SPLIT
from offramp.runtime.chosen_on import Choosing
from offramp.runtime.preprocessing import (
    AnyPreprocessing,
    Preprocessing,
    TokenizerFile,
    read_texts,
    write_preprocessing,
)
from offramp.training.checkpoint_choice import read_choice, write_choice
from offramp.training.config import FitConfig
from offramp.zoo import Network
from offramp.zoo.text import load_tokenizer

RECIPE_FILE = "recipe.json"
WEIGHTS_FILE = "model.safetensors"
POLICY_FILE = "policy.json"


@dataclass(frozen=True, kw_only=True)
class OwnTraining:
    """All that decides how a network of the user's own is trained, but its code.

    Attributes:
        num_classes: Classes of the data.
        num_exits: Exits to add to a plain backbone; None where the network has them.
        fit: How to train.
    """

    num_classes: int
    num_exits: int | None
    fit: FitConfig


@dataclass(frozen=True, kw_only=True)
class _RecipeFile:
    """All that ``recipe.json`` says."""

    recipe: Mapping[str, Any] | None
    class_names: tuple[str, ...]
    data: str | None
    pictures: Preprocessing | None = None
    texts: TokenizerFile | None = None
    own: OwnTraining | None = None


@dataclass(frozen=True, kw_only=True)
class _PolicyFile(Choosing):
    """All that ``policy.json`` may say; what is beside the policy tells how it was chosen."""

    policy: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained network as a run folder holds it.

    Attributes:
        folder: The run folder, as an absolute path.
        network: The network in evaluation mode, on the CPU.
        class_names: Name of each class; empty where none were saved.
        policy: Who leaves where, which blocks run, or when a token halts; None before
            calibration, where there is anything to choose: gates and tokens as they were trained.
        calibration: What was asked of the policy, on which data, and what it reached there.
        recipe: How it was trained; None for a network of the user's own.
        data: What ``--data`` was when it was trained; None if the default was taken.
        preprocessing: How samples become inputs of a network of the user's own; None where that
            was not said, and for a recipe, whose own method says it.
        own: How ``offramp train --network`` trained a network of the user's own; else None.
    """

    folder: Path
    network: Network
    class_names: tuple[str, ...]
    policy: Policy | RoutingPolicy | None
    calibration: dict[str, Any] | None
    recipe: Recipe | None
    data: str | None
    preprocessing: AnyPreprocessing | None = None
    own: OwnTraining | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", self.folder.absolute())

    @property
    def num_classes(self) -> int | None:
        """Classes that the network tells apart; None where nothing says it."""
        if self.recipe is not None:
            return int(self.recipe.network_options["num_classes"])
        return len(self.class_names) or (None if self.own is None else self.own.num_classes)

    @property
    def multi_exit(self) -> MultiExitNetwork:
        """The network, where a command is about exits.

        Raises:
            InvalidArgumentError: If it is one that skips blocks, or whose tokens halt.
        """
        family = family_of(self.network)
        if family.thresholds is not None:
            raise InvalidArgumentError(
                "Expected a run of a network with exits. "
                f"{self.folder} {family.words.does} inside and has one exit: this is not for it."
            )
        return cast(MultiExitNetwork, self.network)

    def require_recipe(self) -> Recipe:
        """The recipe, where a command cannot do without.

        Raises:
            ArtifactError: If the run holds a network of the user's own.
        """
        if self.recipe is None:
            raise ArtifactError(
                f"The run {self.folder} holds a network of your own, without a recipe that names "
                "its data. Use evaluate() and time_runner() from Python; or export() it there, and "
                "give the bundle with --data PATH."
            )
        return self.recipe


def save(
    folder: Path | str,
    network: Network,
    *,
    policy: Policy | RoutingPolicy | None = None,
    class_names: tuple[str, ...] = (),
    preprocessing: AnyPreprocessing | None = None,
) -> None:
    """Save a network of your own, and its policy, as a run folder.

    Args:
        folder: Folder to make; it must not hold a run yet.
        network: The network.
        policy: Its policy, if it has one; gates and tokens as they were trained if None.
        class_names: Name of each class.
        preprocessing: How pictures or texts become its inputs, to be kept with it.
    Raises:
        ArtifactError: If the folder holds a run or cannot be written.
    """
    if isinstance(folder, nn.Module):
        raise InvalidArgumentError(
            f"Expected save(folder, network). Got a {type(folder).__name__} as the folder."
        )
    if policy is None:
        policy = family_of(network).as_trained
    if policy is not None:
        policy_to_dict(policy)  # refuses one that cannot be written, before anything is
    folder = create_folder(folder)
    write_recipe(
        folder, recipe=None, class_names=class_names, data=None, preprocessing=preprocessing
    )
    write_choice(folder, network)
    save_weights(network, folder / WEIGHTS_FILE)
    if policy is not None:
        write_policy(folder, policy)


def load(folder: Path | str, network: Network | None = None) -> Run:
    """Load a run folder.

    Args:
        folder: The run folder.
        network: The network to fill, for a run that :func:`save` wrote; a run of a recipe builds
            its own.
    Returns:
        The run, its network in evaluation mode.
    Raises:
        ArtifactError: If the folder is no run, not trained to the end, damaged, or too new.
        InvalidArgumentError: If the network has to be given and was not.
    """
    folder = Path(folder)
    recipe, class_names, data = read_recipe(folder)
    if not (folder / WEIGHTS_FILE).exists():
        own = recipe is None and read_own(folder) is not None
        by = "--network FILE.py:function" if own else recipe and recipe.name
        resume = f"offramp train {by} --out {folder} --resume" if by else "save it anew."
        raise ArtifactError(
            f"The run {folder} is not trained to the end: {WEIGHTS_FILE} is missing. Finish it: "
            f"{resume}"
        )
    if network is None:
        if recipe is None:
            raise InvalidArgumentError(
                f"The run {folder} holds a network of your own. "
                "Build it and give it: load(folder, network=...)."
            )
        network = recipe.build_network()
    load_weights(network, folder / WEIGHTS_FILE)
    read_choice(folder, network)
    policy, calibration = _read_policy(folder / POLICY_FILE, network)
    return Run(
        folder=folder,
        network=network.eval(),
        class_names=class_names,
        policy=policy,
        calibration=calibration,
        recipe=recipe,
        data=data,
        preprocessing=read_preprocessing(folder),
        own=read_own(folder),
    )


def require_new(folder: Path) -> None:
    """Refuse a folder that holds something already."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ArtifactError(
            f"The folder {folder} exists already. Choose another folder, or go on with what was "
            "begun there: resume=True."
        )


def read_policy(path: Path) -> tuple[Policy | RoutingPolicy, dict[str, Any]]:
    """Read a ``policy.json``."""
    content = read_json(path)
    try:
        return policy_from_dict(decode(content, _PolicyFile).policy), content
    except ArtifactError as error:
        what = str(error).removesuffix(".")
        raise ArtifactError(f"{path} is damaged: {what}. Calibrate the run again.") from error


def _read_policy(
    path: Path, network: Network
) -> tuple[Policy | RoutingPolicy | None, dict[str, Any] | None]:
    family = family_of(network)
    trained = family.as_trained
    if not path.exists():
        return trained or _only_choice(network), None
    policy, content = read_policy(path)
    if not isinstance(policy, family.policy):
        raise ArtifactError(
            f"Expected a policy for {'exits' if trained is None else trained.kind} in {path}, "
            f"which the network has. Got one of the kind {content['policy']['kind']!r}. "
            "Calibrate the run again."
        )
    if policy.num_exits != network.num_exits:
        raise ArtifactError(
            f"Expected a policy for {network.num_exits} exits in {path}. Got one for "
            f"{policy.num_exits}. Calibrate the run again."
        )
    return policy, content


def _only_choice(network: Network) -> Policy | None:
    """With one exit there is nothing to choose; with more, no policy until it is."""
    if network.num_exits > 1:
        return None
    rules = RULES[network.outputs.name]
    return rules.make(rules.default, ())


def create_folder(folder: Path | str) -> Path:
    """Make the folder of a new run."""
    folder = Path(folder)
    require_new(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"Cannot make the folder {folder}: {error.strerror}. Choose another folder."
        ) from error
    return folder


def write_recipe(
    folder: Path,
    *,
    recipe: Recipe | None,
    class_names: tuple[str, ...],
    data: str | None,
    preprocessing: AnyPreprocessing | None = None,
    own: OwnTraining | None = None,
) -> None:
    """Write ``recipe.json``, and the tokenizer beside it where there is one."""
    content: dict[str, Any] = {
        "recipe": None if recipe is None else recipe.to_dict(),
        "class_names": list(class_names),
        "data": data,
    }
    pictures, texts = write_preprocessing(folder, preprocessing)
    if pictures is not None:
        content["pictures"] = asdict(pictures)
    if texts is not None:
        content["texts"] = asdict(texts)
    if own is not None:
        content["own"] = asdict(own)
    write_json(folder / RECIPE_FILE, content)


def read_recipe(folder: Path) -> tuple[Recipe | None, tuple[str, ...], str | None]:
    """Read ``recipe.json``."""
    said = _read_recipe_file(folder)
    try:
        recipe = None if said.recipe is None else Recipe.from_dict(said.recipe)
    except ArtifactError as error:
        raise ArtifactError(f"{folder / RECIPE_FILE} is damaged: {error}") from error
    return recipe, said.class_names, said.data


def read_preprocessing(folder: Path) -> AnyPreprocessing | None:
    """Read how samples become inputs, as ``recipe.json`` says it of a network of one's own."""
    said = _read_recipe_file(folder)
    return said.pictures if said.texts is None else read_texts(folder, said.texts)


def read_own(folder: Path) -> OwnTraining | None:
    """Read how a network of the user's own was trained; None for a recipe's, or one saved."""
    return _read_recipe_file(folder).own


def _read_recipe_file(folder: Path) -> _RecipeFile:
    if not (folder / RECIPE_FILE).is_file():
        raise ArtifactError(
            f"Expected a run folder with a {RECIPE_FILE} in it. {folder} has none. "
            "Make one: offramp train RECIPE --out RUN"
        )
    content = read_json(folder / RECIPE_FILE)
    try:
        return decode(content, _RecipeFile)
    except ArtifactError as error:
        raise ArtifactError(f"{folder / RECIPE_FILE} is damaged: {error}") from error


def write_policy(
    folder: Path, policy: Policy | RoutingPolicy, *, calibration: dict[str, Any] | None = None
) -> None:
    """Write ``policy.json``."""
    write_json(folder / POLICY_FILE, {"policy": policy_to_dict(policy), **(calibration or {})})


def load_batches(
    recipe: Recipe, split: str, data: str | None = None
) -> tuple[Batches, tuple[str, ...], str]:
    """Load a split of a recipe's data."""
    if split == CALIBRATION_SPLIT and recipe.calibration_share == 0:
        raise InvalidArgumentError(
            f"The recipe {recipe.name!r} was trained with calibration_share=0: no data was set "
            "aside. Give thresholds by hand, or train with calibration_share=0.1."
        )
    whole = _load_checked(recipe, "train" if split == CALIBRATION_SPLIT else split, data)
    if split in ("train", CALIBRATION_SPLIT):
        train, calibration = _cut_train(recipe, whole)
        batches = train if calibration is None or split == "train" else calibration
    else:
        batches = _as_batches(recipe, whole).unaugmented()
    rows = hashlib.sha256(batches.rows_N.numpy().tobytes()).hexdigest()
    fingerprint = hashlib.sha256(json.dumps([whole.fingerprint(), rows]).encode()).hexdigest()
    return batches, whole.class_names, fingerprint


def load_training_data(
    recipe: Recipe, data: str | None = None
) -> tuple[Batches, Batches | None, tuple[str, ...]]:
    """Load the train split once and cut the calibration set from it."""
    whole = _load_checked(recipe, "train", data)
    return *_cut_train(recipe, whole), whole.class_names


def _load_checked(recipe: Recipe, split: str, data: str | None) -> Split | TextSplit:
    whole = load_split(recipe.data, split, data)
    check_labels(known_labels(whole.labels_N), num_classes=recipe.network_options["num_classes"])
    return whole


def _as_batches(recipe: Recipe, whole: Split | TextSplit) -> Batches:
    """All samples of a split, as the recipe's network takes them, augmented as it says."""
    if isinstance(whole, TextSplit):
        ids = [coded.ids for coded in load_tokenizer().encode_batch(list(whole.texts))]
        return TensorBatches(TextArrays(ids, whole.labels_N.numpy(), pad_id=PAD_ID))
    kind = ImageBatches if whole.labels_N.ndim == 1 else MaskBatches
    return kind(
        whole.store,
        whole.labels_N,
        normalise=recipe.require_normalisation(),
        augment=recipe.augment,
    )


def _cut_train(recipe: Recipe, whole: Split | TextSplit) -> tuple[Batches, Batches | None]:
    batches = _as_batches(recipe, whole)
    if recipe.calibration_share == 0:
        return batches, None
    return split_off_calibration(
        batches,
        share=recipe.calibration_share,
        seed=recipe.fit.seed,
        uniform_prior=recipe.uniform_prior,
    )


def is_in_sample(run: Run, split: str, fingerprint: str) -> bool:
    """Tell if figures on these samples would be too good."""
    chosen_on = ((run.calibration or {}).get("data") or {}).get("sha256")
    return split == "train" or chosen_on == fingerprint
