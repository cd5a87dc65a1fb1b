"""``offramp place``."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.options import JsonOption, use_threads, write_figures
from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import nn

    from offramp.evaluation.placement import Placement
    from offramp.recipes.recipe import Recipe

_MAX_BATCH_SIZE = 4096
_ROUNDS = 50


def place(
    backbone_name: Annotated[
        str, typer.Argument(metavar="BACKBONE", help="A recipe, or a run folder.")
    ],
    num_exits: Annotated[int, typer.Option(help="Exits, the final one counted.")],
    batch_size: Annotated[int, typer.Option(help="Samples a batch.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads that compute.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Propose where to put exits: cuts that share the backbone's time out evenly."""
    import torch

    from offramp.data.sources import SOURCES
    from offramp.evaluation import placement as measured
    from offramp.evaluation.timing import hardware_name

    if not 1 <= batch_size <= _MAX_BATCH_SIZE:
        raise InvalidArgumentError(
            f"--batch-size must be an int in [1, {_MAX_BATCH_SIZE}]. Got {batch_size}."
        )
    use_threads(threads)
    backbone, recipe = _find_backbone(backbone_name)
    num_classes = recipe.network_options["num_classes"]
    image_shape = SOURCES[recipe.data].image_shape
    if image_shape is None:
        raise InvalidArgumentError(
            f"Expected a recipe on images. {backbone_name} is on texts, whose layers all cost the "
            "same: put an exit after every layer, or every other."
        )
    placement = measured.place(
        backbone,
        num_exits=num_exits,
        example=torch.randn(batch_size, *image_shape),
        num_classes=num_classes,
        rounds=_ROUNDS,
    )
    hardware, used_threads = hardware_name(torch.device("cpu")), torch.get_num_threads()
    if json_file != "-":
        print(placement)
        print(f"{hardware}, {used_threads} threads, torch {torch.__version__}")
        _print_use(placement, num_classes)
    if json_file is not None:
        where = {
            "backbone": backbone_name,
            "hardware": hardware,
            "threads": used_threads,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }
        write_figures(where | placement.to_dict(), json_file)


def _find_backbone(name: str) -> tuple[nn.Module, Recipe]:
    """The stages and the final exit, without exits between, of a recipe or else of a run."""
    from torch import nn

    from offramp.families import family_of
    from offramp.recipes.exits import RECIPES, find_recipe
    from offramp.runs.run import load

    if name not in RECIPES and Path(name).is_dir():
        run = load(name)
        network, recipe = run.multi_exit, run.require_recipe()
    else:
        recipe = replace(find_recipe(name), variant="plain")
        plain = recipe.build_network()
        _, network = family_of(plain).whole(plain)
    return nn.Sequential(*network.stages, network.exits[-1]), recipe


def _print_use(placement: Placement, num_classes: int) -> None:
    paths = ", ".join(f'"{path}"' for path in placement.at)
    print("With backbone = nn.Sequential(*network.stages, network.exits[-1]):")
    print(f"add_exits(backbone, at=[{paths}], num_classes={num_classes}, example=images)")
