"""Runs that are shared: to the Hugging Face hub, from it, and as a folder to be handed on.

What travels is JSON, safetensors and Markdown, and of a bundle its ONNX files; checkpoints, logs
and stage times stay at home, and so does the bundle in a run folder.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors
from safetensors import SafetensorError, safe_open

from offramp.artifacts import atomic_folder
from offramp.data.sources import SOURCES
from offramp.errors import ArtifactError, InvalidArgumentError, reason
from offramp.policy.as_dict import policy_from_dict
from offramp.policy.policies import Policy
from offramp.policy.routing_policy import RoutingPolicy
from offramp.recipes.recipe import Recipe
from offramp.runs.card import check_evaluation, model_card
from offramp.runs.run import (
    POLICY_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    Run,
    load,
    read_own,
    read_policy,
    read_preprocessing,
    read_recipe,
    write_recipe,
)
from offramp.runtime.bundle import BUNDLE_FILE, Bundle, is_bundle, read_bundle
from offramp.runtime.preprocessing import TOKENIZER_FILE
from offramp.training.checkpoint_choice import CHOICE_FILE
from offramp.zoo import Network

CARD_FILE = "README.md"
_METRICS_FILE = "metrics.jsonl"  # as training.fit has it, which takes Lightning to import
SHARED_FILES = (
    *(RECIPE_FILE, WEIGHTS_FILE, POLICY_FILE, CHOICE_FILE, TOKENIZER_FILE),
    *(_METRICS_FILE, CARD_FILE),
)
"""Files that are sent and fetched; nothing else of a run folder or a repository is."""
_OF_BUNDLES = (BUNDLE_FILE, "*.onnx", TOKENIZER_FILE, CARD_FILE)
"""Patterns of the same of a bundle."""


def save_pretrained(
    run: Run | Path | str,
    folder: Path | str,
    *,
    evaluation: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write what :func:`push_to_hub` would send into a new folder, whole or not at all.

    These are recipe, weights, policy, the losses of every epoch, and a model card; of a bundle its
    files and a card. Where the data lay on this machine is left out.

    Args:
        run: A run folder, or a run that was loaded: the files of its folder are taken; or a bundle.
        folder: Folder to make; it may exist if it is empty.
        evaluation: Figures for the card, as ``offramp evaluate --json`` writes them or
            ``Evaluation.to_dict()`` gives them, measured with these weights and this policy. If
            None, the card says that nothing was measured.
        repo_id: What the card calls the run; the folder's name if None.
    Returns:
        The folder.
    Raises:
        ArtifactError: If the run is damaged or not trained to the end, or the folder holds
            something or cannot be made.
        InvalidArgumentError: If the figures are no evaluation, or one of another run.
    """
    contents = _read(run)
    _check_figures(contents, evaluation)
    with _new_folder(Path(folder)) as making:
        _write(contents, making, repo_id or Path(folder).resolve().name, evaluation)
    return Path(folder)


def push_to_hub(
    run: Run | Path | str,
    repo_id: str,
    *,
    evaluation: Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Send a run to the Hugging Face hub.

    The repository is made if there is none. Of one that is there, the files of the names that a
    run has are replaced, and taken away where this run has none; others stay.

    Args:
        run: A run folder, or a run that was loaded: the files of its folder are taken; or a bundle.
        repo_id: Name of the repository, such as ``user/digits``.
        evaluation: As for :func:`save_pretrained`.
        private: Whether only you shall see it; None for your account's default.
        token: Of a user who may write there; the one of ``hf auth login`` if None.
    Returns:
        Address of the commit.
    Raises:
        ArtifactError: If the run is damaged or not trained to the end, the hub refuses or cannot
            be reached, or a private repository was asked for and a public one is there.
        InvalidArgumentError: If the figures are no evaluation, or one of another run, or the name
            can be no repository's.
    """
    contents = _read(run)
    _check_figures(contents, evaluation)
    api = _connect(token)
    with _own_errors(repo_id):
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_public = private and not api.model_info(full_id).private
    if is_public:
        raise ArtifactError(
            f"The repository {full_id} is there already and public; a private one was asked for. "
            "Choose another name, or make it private on the hub."
        )
    with tempfile.TemporaryDirectory() as scratch:
        _write(contents, Path(scratch), full_id, evaluation)
        with _own_errors(full_id):
            names = SHARED_FILES if contents.bundle is None else _OF_BUNDLES
            commit = api.upload_folder(
                repo_id=full_id,
                folder_path=scratch,
                commit_message=f"A run of offramp {version('offramp')}",
                allow_patterns=list(names),
                delete_patterns=sorted({*SHARED_FILES, *names, BUNDLE_FILE}),
            )
    return commit.commit_url


def from_pretrained(
    source: Path | str,
    network: Network | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | str | None = None,
) -> Run:
    """Load a run from the Hugging Face hub, or from a folder.

    Only safetensors and JSON are read. The run's folder is the hub's cache: to calibrate or
    export, take a folder of your own with ``offramp pull``.

    Args:
        source: Name of a repository, such as ``user/digits``, or a run folder; a folder of that
            name goes first, and a Path is never a repository.
        network: The network to fill, for a run that :func:`~offramp.save` wrote; a run of a
            recipe builds its own.
        revision: Branch, tag or commit of the repository; its main branch if None.
        token: Of a user who may read it; the one of ``hf auth login`` if None.
        cache_dir: Where the hub's cache is; its own default if None.
    Returns:
        The run, its network in evaluation mode.
    Raises:
        ArtifactError: If there is no such repository or revision, it may not be read, holds no
            run, or the hub cannot be reached; or the run is damaged or too new.
        InvalidArgumentError: If the network has to be given and was not, or the source is neither
            a folder nor a name that a repository can have.
    """
    folder = _find(source, revision=revision, token=token, cache_dir=cache_dir)
    if is_bundle(folder):
        raise ArtifactError(
            f"{source} is a bundle, which offramp.runtime.Session runs. Fetch it with "
            "offramp pull, or give its folder to Session."
        )
    return load(folder, network)


def pull(repo_id: str, folder: Path | str, *, revision: str | None = None) -> Path:
    """Fetch a run or a bundle from the hub into a new folder, whole or not at all."""
    _require_new(Path(folder))
    fetched = _find(repo_id, revision=revision)
    contents = _read(fetched)
    with _new_folder(Path(folder)) as making:
        for name in (*contents.files, CARD_FILE):
            if (fetched / name).is_file():
                shutil.copyfile(fetched / name, making / name)
    return Path(folder)


@dataclass(frozen=True, kw_only=True)
class _Contents:
    """Content of a run folder or a bundle, checked as far as can be without a network's code."""

    folder: Path
    recipe: Recipe | None
    class_names: tuple[str, ...]
    data: str | None
    policy: Policy | RoutingPolicy | None
    calibration: dict[str, Any] | None
    bundle: Bundle | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Names of files that travel as they are, as far as they are there."""
        if self.bundle is None:
            return tuple(name for name in SHARED_FILES if name != CARD_FILE)
        texts = self.bundle.texts
        files = (BUNDLE_FILE, *(file.name for file in self.bundle.files))
        return files if texts is None else (*files, texts.file)


def _read(run: Run | Path | str) -> _Contents:
    folder = run.folder if isinstance(run, Run) else Path(run)
    if is_bundle(folder):
        return _read_bundle(folder)
    recipe, class_names, data = read_recipe(folder)
    if recipe is not None:
        loaded = load(folder)
        policy, calibration = loaded.policy, loaded.calibration
    else:
        policy, calibration = _read_own(folder)
    return _Contents(
        folder=folder,
        recipe=recipe,
        class_names=class_names,
        data=data,
        policy=policy,
        calibration=calibration,
    )


def _read_bundle(folder: Path) -> _Contents:
    bundle = read_bundle(folder)
    chosen = bundle.calibration
    return _Contents(
        folder=folder,
        recipe=None if bundle.recipe is None else Recipe.from_dict(bundle.recipe),
        class_names=bundle.class_names,
        data=None,
        policy=policy_from_dict(dict(bundle.policy)),
        calibration=None if chosen is None else asdict(chosen),
        bundle=bundle,
    )


def _read_own(folder: Path) -> tuple[Policy | RoutingPolicy | None, dict[str, Any] | None]:
    """Weights that can be read, and the policy, of a network that is not at hand."""
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"Cannot read the weights {folder / WEIGHTS_FILE}: {reason(error)}. Save the run again."
        ) from error
    if not (folder / POLICY_FILE).exists():
        return None, None
    return read_policy(folder / POLICY_FILE)


def _check_figures(contents: _Contents, evaluation: Mapping[str, Any] | None) -> None:
    if evaluation is not None:
        check_evaluation(evaluation, recipe=contents.recipe, policy=contents.policy)


def _write(
    contents: _Contents, folder: Path, name: str, evaluation: Mapping[str, Any] | None
) -> None:
    card = model_card(
        name,
        recipe=contents.recipe,
        policy=contents.policy,
        calibration=contents.calibration,
        evaluation=evaluation,
        bundle=contents.bundle,
    )
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    if contents.bundle is not None:
        for file in contents.files:
            shutil.copyfile(contents.folder / file, folder / file)
        return
    recipe, data = contents.recipe, contents.data
    # A folder on this machine says nothing on another; the word that downloads does.
    travels = recipe is not None and data == SOURCES[recipe.data].download
    write_recipe(
        folder,
        recipe=recipe,
        class_names=contents.class_names,
        data=data if travels else None,
        preprocessing=read_preprocessing(contents.folder),
        own=read_own(contents.folder),
    )
    for file in (WEIGHTS_FILE, POLICY_FILE, CHOICE_FILE, _METRICS_FILE):
        if (contents.folder / file).is_file():
            shutil.copyfile(contents.folder / file, folder / file)


def _find(
    source: Path | str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | str | None = None,
) -> Path:
    """A run folder as it is, or the snapshot of a repository in the hub's cache."""
    if isinstance(source, Path) or Path(source).is_dir():
        return Path(source)
    api = _connect(token)
    with _own_errors(source):
        # Recipe and card first: what is no run of ours may have weights of many gigabytes.
        patterns = [RECIPE_FILE, BUNDLE_FILE, CARD_FILE]
        first = api.snapshot_download(
            source, revision=revision, cache_dir=cache_dir, allow_patterns=patterns
        )
        holds_bundle = is_bundle(Path(first))
        if not holds_bundle and not (Path(first) / RECIPE_FILE).is_file():
            raise ArtifactError(
                f"The repository {source} holds no Offramp run: it has no {RECIPE_FILE}, and no "
                f"{BUNDLE_FILE}."
            )
        folder = api.snapshot_download(
            source,
            revision=Path(first).name,  # the commit, so that all files are of one
            cache_dir=cache_dir,
            allow_patterns=list(_OF_BUNDLES if holds_bundle else SHARED_FILES),
        )
    if not holds_bundle and not (Path(folder) / WEIGHTS_FILE).is_file():
        raise ArtifactError(f"The repository {source} holds no whole run: no {WEIGHTS_FILE}.")
    return Path(folder)


def _connect(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="offramp", library_version=version("offramp"))


@contextmanager
def _own_errors(repo_id: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line of ours, from narrow to wide."""
    log_in = "log in with: hf auth login"
    try:
        yield
    except errors.HFValidationError as error:
        raise InvalidArgumentError(
            f"Expected a run folder, or a repository such as user/digits. Got {repo_id!r}, which "
            f"is neither: {reason(error)}"
        ) from error
    except errors.GatedRepoError as error:
        raise ArtifactError(
            f"The repository {repo_id} is gated. Ask for access at {constants.ENDPOINT}/{repo_id}, "
            f"then {log_in}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ArtifactError(
            f"There is no repository {repo_id} at {constants.ENDPOINT} that you may see, and no "
            f"folder of that name here. Check the name; if it is private, {log_in}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ArtifactError(
            f"The repository {repo_id} has no such revision. Name a branch, a tag or a commit."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = reason(error.__cause__ or error)
        raise ArtifactError(
            f"Cannot fetch {repo_id} from the hub ({why}), it is not in the cache, and there is no "
            "folder of that name here. Connect to the internet, or give a folder."
        ) from error
    except errors.HfHubHTTPError as error:
        refused = error.response.status_code in (401, 403)
        raise ArtifactError(
            f"The hub refuses {repo_id}: {reason(error)}. "
            + (f"With a token that may do this, {log_in}" if refused else "Try again later.")
        ) from error
    # The library's transports: httpx raises the first, hf_xet the others.
    except (errors.HTTPError, OSError, RuntimeError) as error:  # type: ignore[attr-defined]
        raise ArtifactError(
            f"Talking to the hub about {repo_id} failed: {reason(error)}. "
            "Check the network and the disk."
        ) from error


def _require_new(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ArtifactError(f"{folder} exists already. Choose the name of a new folder.")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` that becomes it when the block has ended well."""
    _require_new(folder)
    with atomic_folder(folder, instead="Choose another.") as making:
        yield making
