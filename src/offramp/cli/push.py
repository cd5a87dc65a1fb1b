"""``offramp push``."""

from __future__ import annotations

from offramp.cli.evaluate import measure
from offramp.cli.options import Evaluate, Push
from offramp.errors import InvalidArgumentError
from offramp.runs.hub import push_to_hub
from offramp.runs.run import read_recipe


def push(asked: Push) -> None:
    """Evaluate a run and send it to the hub."""
    run = asked.run
    if read_recipe(run)[0] is None and asked.evaluates:
        raise InvalidArgumentError(
            f"The run {run} holds a network of your own, without a recipe that names its data. "
            "Give --no-evaluate, or from Python: push_to_hub(run, repo_id, evaluation=...)."
        )
    figures = None
    if asked.evaluates:
        figures = measure(Evaluate(run=run, split="test", data=asked.data, plain=asked.plain))
    address = push_to_hub(run, asked.repo_id, evaluation=figures, private=asked.private or None)
    print(f"pushed {run}: {address}")
