"""``offramp recipes``."""

from __future__ import annotations

from offramp.cli.options import Recipes
from offramp.recipes.exits import RECIPES


def recipes(_: Recipes) -> None:
    """Print each recipe."""
    for recipe in RECIPES.values():
        print(f"{recipe.name}\n  {recipe.summary}")
        print(f"  network {recipe.network}, data {recipe.data}; expect {recipe.expected}")
