"""Several ponder weights as short fine-tunes from one plain start, each left as a run folder.

    python -m offramp train emnist-avit --set variant=plain --epochs 14 --out runs/emnist-avit-plain
    python benchmarks/ponder_weights.py runs/emnist-avit-plain --weights plain,0.0005,0.002,0.01

The word plain trains the start on for as long and at the same rate, without halting: what the
others are compared with. Accuracy and cost of each come from `offramp evaluate` and `offramp
frontier` on those folders.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from offramp.model.checkpoint import save_weights
from offramp.model.multi_exit import MultiExitNetwork
from offramp.recipes.recipe import Recipe
from offramp.recipes.settings import override
from offramp.routing.halting import HaltingNetwork
from offramp.runs import run as run_folder
from offramp.training.fit import fit

PLAIN = "plain"
"""Instead of a ponder weight: no halting."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("start", type=Path, help="a run of a recipe whose tokens halt, plain")
    parser.add_argument("--weights", default="0.0005,0.002,0.01,0.05")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--data", default=None)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    settings = dict(text.split("=", 1) for text in asked.set)
    if cuts := {"seed", "calibration_share", "uniform_prior"} & settings.keys():
        parser.error(
            f"{', '.join(sorted(cuts))}: the start was trained on what this would hold out"
        )
    for weight in asked.weights.split(","):
        run = run_folder.load(asked.start)
        recipe = fine_tune(run.require_recipe(), weight, asked.epochs, settings)
        network = from_plain(recipe, run.network)
        folder = asked.out / f"{recipe.name}-ponder-{weight}"
        data = asked.data or run.data
        train, calibration, class_names = run_folder.load_training_data(recipe, data)
        run_folder.create_folder(folder)
        run_folder.write_recipe(folder, recipe=recipe, class_names=class_names, data=data)
        config = replace(recipe.config_as_trained(), device=asked.device)
        fit(network, train, calibration, config, folder=folder)
        save_weights(network, folder / run_folder.WEIGHTS_FILE)
        print(f"ponder weight {weight}: {folder}", flush=True)


def fine_tune(recipe: Recipe, weight: str, epochs: int, settings: dict[str, str]) -> Recipe:
    """The recipe with nothing but its last phase, at another ponder weight; or plain."""
    own = {"epochs": str(epochs), "halting_epochs": str(epochs), "warmup_epochs": "0"}
    adaptive = replace(recipe, variant="adaptive")
    if weight != PLAIN:
        return override(adaptive, {**own, "ponder_weight": weight, **settings})
    halting = override(adaptive, {**own, **settings}).fit.halting
    rate = {"learning_rate": str(halting.halting_learning_rate)}
    return override(replace(recipe, variant="plain"), {**own, **settings, **rate})


def from_plain(
    recipe: Recipe, plain: MultiExitNetwork | HaltingNetwork
) -> MultiExitNetwork | HaltingNetwork:
    """The network of a recipe, with the weights of a plain one."""
    network = recipe.build_network()
    for_plain = network.without_halting() if isinstance(network, HaltingNetwork) else network
    if isinstance(plain, HaltingNetwork):
        plain = plain.without_halting()
    for_plain.load_state_dict(plain.state_dict())
    return network


if __name__ == "__main__":
    main()
