"""Files that outlive a process: written whole or not at all, checked when read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from offramp.decoding import parse_json
from offramp.errors import ArtifactError

SCHEMA_VERSION = 4
"""Version of every JSON file in a run folder or bundle; older ones are read, newer ones refused.

2 added the file for single samples to bundles; 3 preprocessing to bundles and run folders, and to
bundles how their policy was chosen; 4 to that the ordered front and the samples' hashes.
"""

BUNDLE_FOLDER = "bundle"
"""Folder of the bundle in a run folder."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends without error."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ArtifactError(
            f"Cannot write {path}: {error.strerror}. Choose a folder that can be written."
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, *, instead: str) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` that takes its place where the block ends well."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise ArtifactError(
            f"Cannot make the folder {folder}: {error.strerror}. {instead}"
        ) from error
    try:
        yield making
        making.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` with the schema version, atomically."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that :func:`write_json` wrote."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"Expected the file {path}, found none.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"Cannot read {path}: it is damaged or no JSON ({error}).") from error
    version = content.pop("schema_version", None) if isinstance(content, dict) else None
    if not isinstance(content, dict) or type(version) is not int:
        raise ArtifactError(
            f"Expected a schema_version in {path}, found none: not an Offramp file."
        )
    if version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version}; this Offramp reads up to {SCHEMA_VERSION}. "
            "Upgrade Offramp: pip install --upgrade offramp"
        )
    return content


def require_run(folder: Path) -> None:
    """Raise ArtifactError if a folder is no run, before torch is imported to open it."""
    if not (folder / "recipe.json").is_file():
        raise ArtifactError(
            f"Expected a run folder with a recipe.json in it, or a bundle. {folder} has none. "
            "Make one: offramp train RECIPE --out RUN, or offramp.export from Python."
        )
