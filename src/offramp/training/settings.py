"""How ``--set`` changes a recipe."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from offramp.errors import InvalidArgumentError
from offramp.training.config import FitConfig, GateConfig
from offramp.training.data import RandomWarp
from offramp.training.recipes import Recipe, Variant
from offramp.training.sources import nearest


def override(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """Change settings of a recipe by name.

    Args:
        recipe: The recipe to start from.
        settings: Text by name: a field of FitConfig, of GateConfig where the recipe has gates, an
            option of the network, or variant, calibration_share, uniform_prior, augment (true or
            false). Numbers, true, false and comma-separated lists are understood.
    Returns:
        A new recipe.
    Raises:
        InvalidArgumentError: If a name is unknown (the nearest is named) or a value is of the
            wrong kind.
    """
    fit_types = get_type_hints(FitConfig)
    del fit_types["device"]  # where a run is trained is no setting of it
    del fit_types["gates"]  # whose fields are set one by one; the network's option is of that name
    gate_types = {} if recipe.fit.gates is None else get_type_hints(GateConfig)
    own_types = {
        "variant": Variant,
        "calibration_share": float,
        "uniform_prior": bool,
        "augment": bool,
    }
    known = [*fit_types, *gate_types, *own_types, *recipe.network_options, "num_exits"]
    fit_changes: dict[str, Any] = {}
    gate_changes: dict[str, Any] = {}
    own_changes: dict[str, Any] = {}
    options = dict(recipe.network_options)
    for key, text in settings.items():
        if key in fit_types:
            fit_changes[key] = _parse(key, text, fit_types[key])
        elif key in gate_types:
            gate_changes[key] = _parse(key, text, gate_types[key])
        elif key == "augment":
            wanted = _parse(key, text, bool)
            own_changes[key] = (recipe.augment or RandomWarp()) if wanted else None
        elif key in own_types:
            own_changes[key] = _parse(key, text, own_types[key])
        elif key in known:
            options[key] = _literal(text)
        else:
            raise InvalidArgumentError(
                f"The recipe {recipe.name!r} has no setting {key!r}. "
                f"Did you mean {nearest(key, known)!r}? It has {', '.join(sorted(set(known)))}."
            )
    fit = _with_changes(recipe.fit, fit_changes, gate_changes)
    static = {key: value for key, value in recipe.static_options.items() if key not in settings}
    own_changes["static_options"] = static  # what was asked for goes before the recipe's own
    return replace(recipe, network_options=options, fit=fit, **own_changes)


def _with_changes(
    fit: FitConfig, changes: Mapping[str, Any], gate_changes: Mapping[str, Any]
) -> FitConfig:
    """Change settings; the epochs of a phase stay as large a share of all, unless they are set."""
    epochs = max(changes.get("epochs", fit.epochs), 0)
    phases = {"backbone_epochs": fit.backbone_epochs * epochs // fit.epochs}
    if fit.gates is None:
        return replace(fit, **{**phases, **changes})
    reward_epochs = {"reward_epochs": fit.gates.reward_epochs * epochs // fit.epochs}
    gates = replace(fit.gates, **{**reward_epochs, **gate_changes})
    return replace(fit, gates=gates, **{**phases, **changes})


def _parse(key: str, text: str, kind: Any) -> Any:
    value = text if text in get_args(kind) else _literal(text)  # a choice may be named "none"
    if _fits(value, kind):
        return float(value) if kind is float else value
    if get_origin(kind) is Literal:
        expected = ", ".join(str(choice) for choice in get_args(kind))
    else:
        expected = getattr(kind, "__name__", str(kind))
    raise InvalidArgumentError(f"The {key!r} setting must be of {expected}. Got {text!r}.")


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in get_args(kind))
    if origin is tuple:
        element = get_args(kind)[0]
        return isinstance(value, tuple) and all(_fits(item, element) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _literal(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
