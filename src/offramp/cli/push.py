"""``offramp push``."""

from __future__ import annotations

from offramp.cli.evaluate import measure
from offramp.cli.options import Evaluate, Push
from offramp.errors import InvalidArgumentError
from offramp.runs.hub import push_to_hub
from offramp.runs.run import read_recipe
from offramp.runtime import read_bundle
from offramp.runtime.bundle import is_bundle


def push(asked: Push) -> None:
    """Evaluate a run or a bundle and send it to the hub."""
    run, figures = asked.run, None
    recipe = read_bundle(run).recipe if is_bundle(run) else read_recipe(run)[0]
    if asked.evaluates:
        if recipe is None and (asked.data is None or not (is_bundle(run) or asked.network)):
            raise InvalidArgumentError(
                f"{run} holds a network of your own, without a recipe that names its data. Give "
                "--no-evaluate; or --data PATH, and --network for a run; or from Python: "
                "push_to_hub(run, repo_id, evaluation=...)."
            )
        split = asked.split or (None if recipe is None else "test")
        figures = measure(
            Evaluate(
                run=run,
                split=split,
                data=asked.data,
                subset=asked.subset,
                network=asked.network,
                plain=asked.plain,
            )
        )
    address = push_to_hub(run, asked.repo_id, evaluation=figures, private=asked.private or None)
    print(f"pushed {run}: {address}")
