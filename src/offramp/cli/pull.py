"""``offramp pull``."""

from __future__ import annotations

from pathlib import Path

from offramp.cli.options import Pull
from offramp.runs.hub import pull as fetch


def pull(asked: Pull) -> None:
    """Fetch a run from the hub."""
    out = asked.out or Path("runs") / Path(asked.repo_id).name
    print(f"pulled {asked.repo_id}: {fetch(asked.repo_id, out, revision=asked.revision)}")
