"""``offramp place``."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from offramp.cli.options import Place, write_figures
from offramp.data.sources import SOURCES
from offramp.errors import InvalidArgumentError
from offramp.evaluation import placement as measured
from offramp.evaluation.placement import Placement
from offramp.evaluation.timing import hardware_name
from offramp.families import family_of
from offramp.recipes.exits import RECIPES, find_recipe
from offramp.runs.own_network import load_run
from offramp.runtime.preprocessing import Preprocessing
from offramp.workflow.opened_run import preprocessing_of_run
from offramp.workflow.time import use_threads

_ROUNDS = 50


def place(asked: Place) -> None:
    """Time the stages of a backbone and print where to cut it."""
    use_threads(asked.threads)
    backbone, num_classes, image_shape = _find_backbone(asked.backbone, asked.network)
    if image_shape is None:
        raise InvalidArgumentError(
            f"Expected a recipe on images. {asked.backbone} is on texts, whose layers all cost the "
            "same: put an exit after every layer, or every other."
        )
    placement = measured.place(
        backbone,
        num_exits=asked.num_exits,
        example=torch.randn(asked.batch_size, *image_shape),
        num_classes=num_classes,
        rounds=_ROUNDS,
    )
    hardware, used_threads = hardware_name(torch.device("cpu")), torch.get_num_threads()
    if asked.json_file != "-":
        print(placement)
        print(f"{hardware}, {used_threads} threads, torch {torch.__version__}")
        _print_use(placement, num_classes)
    if asked.json_file is not None:
        where = {
            "backbone": asked.backbone,
            "hardware": hardware,
            "threads": used_threads,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }
        write_figures(where | placement.to_dict(), asked.json_file)


def _find_backbone(
    name: str, named: str | None
) -> tuple[nn.Module, int, tuple[int, int, int] | None]:
    """The stages and the final exit, without exits between, of a recipe or else of a run."""
    if name not in RECIPES and Path(name).is_dir():
        run = load_run(name, named)
        if run.recipe is None:
            found = preprocessing_of_run(run)
            shape = found.shape if isinstance(found, Preprocessing) else None
        else:
            shape = SOURCES[run.recipe.data].image_shape
        network, num_classes = run.multi_exit, run.num_classes
    else:
        recipe = replace(find_recipe(name), variant="plain")
        plain = recipe.build_network()
        _, network = family_of(plain).whole(plain)
        num_classes, shape = recipe.network_options["num_classes"], SOURCES[recipe.data].image_shape
    assert num_classes is not None
    return nn.Sequential(*network.stages, network.exits[-1]), num_classes, shape


def _print_use(placement: Placement, num_classes: int) -> None:
    paths = ", ".join(f'"{path}"' for path in placement.at)
    print("With backbone = nn.Sequential(*network.stages, network.exits[-1]):")
    print(f"add_exits(backbone, at=[{paths}], num_classes={num_classes}, example=images)")
