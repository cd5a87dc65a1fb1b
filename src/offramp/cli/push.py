"""``offramp push`` and ``offramp pull``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offramp.cli.evaluate import measure
from offramp.cli.options import DataOption, RunFolder
from offramp.errors import InvalidArgumentError

Repository = Annotated[
    str, typer.Argument(metavar="REPO", help="On the Hugging Face hub, such as user/digits.")
]


def push(
    run: RunFolder,
    repo_id: Repository,
    private: Annotated[bool, typer.Option("--private", help="Only you shall see it.")] = False,
    evaluates: Annotated[
        bool,
        typer.Option("--evaluate/--no-evaluate", help="Measure on test for the model card."),
    ] = True,
    data: DataOption = None,
    plain: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A plain network trained as long, to stand beside."),
    ] = None,
) -> None:
    """Evaluate a run on test and send it to the hub, with a model card that says what came out."""
    from offramp.runs.hub import push_to_hub
    from offramp.runs.run import read_recipe

    if read_recipe(run)[0] is None and evaluates:
        raise InvalidArgumentError(
            f"The run {run} holds a network of your own, without a recipe that names its data. "
            "Give --no-evaluate, or from Python: push_to_hub(run, repo_id, evaluation=...)."
        )
    figures = measure(run, split="test", data=data, plain=plain) if evaluates else None
    address = push_to_hub(run, repo_id, evaluation=figures, private=private or None)
    print(f"pushed {run}: {address}")


def pull(
    repo_id: Repository,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder to make; default runs/NAME.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; default the main branch.")
    ] = None,
) -> None:
    """Fetch a run from the hub into a run folder."""
    from offramp.runs.hub import pull as fetch

    folder = fetch(repo_id, out or Path("runs") / Path(repo_id).name, revision=revision)
    print(f"pulled {repo_id}: {folder}")
