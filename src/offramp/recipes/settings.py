"""Changing a recipe by ``--set``."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from offramp.data.images import RandomWarp
from offramp.data.sources import nearest
from offramp.errors import InvalidArgumentError
from offramp.recipes.recipe import Recipe, Variant
from offramp.training.config import FitConfig, GateConfig, HaltingConfig

_KINDS = {"gates": GateConfig, "halting": HaltingConfig}
"""Settings of one kind of network, by the field of FitConfig that holds them."""
_LAST_PHASES = {"gates": ("reward_epochs", "settled_epochs"), "halting": ("halting_epochs",)}
"""Settings that make so many last epochs another kind, each within the one before."""


def override(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """Change settings of a recipe by name."""
    fit_types = get_type_hints(FitConfig)
    del fit_types["device"]  # where a run is trained is no setting of it
    kind_types: dict[str, Any] = {}
    for name, kind in _KINDS.items():
        del fit_types[name]  # whose fields are set one by one; a network's option is of that name
        if getattr(recipe.fit, name) is not None:
            kind_types |= get_type_hints(kind)
    own_types = {
        "variant": Variant,
        "calibration_share": float,
        "uniform_prior": bool,
        "augment": bool,
    }
    known = [*fit_types, *kind_types, *own_types, *recipe.network_options, "num_exits"]
    fit_changes: dict[str, Any] = {}
    kind_changes: dict[str, Any] = {}
    own_changes: dict[str, Any] = {}
    options = dict(recipe.network_options)
    for key, text in settings.items():
        if key in fit_types:
            fit_changes[key] = _parse(key, text, fit_types[key])
        elif key in kind_types:
            kind_changes[key] = _parse(key, text, kind_types[key])
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
    fit = _with_changes(recipe.fit, fit_changes, kind_changes)
    static = {key: value for key, value in recipe.static_options.items() if key not in settings}
    own_changes["static_options"] = static  # what was asked for goes before the recipe's own
    return replace(recipe, network_options=options, fit=fit, **own_changes)


def override_fit(fit: FitConfig, settings: Mapping[str, str]) -> FitConfig:
    """Change settings of training by name, where there is no recipe."""
    types = {
        name: kind
        for name, kind in get_type_hints(FitConfig).items()
        if name not in ("device", *_KINDS)
    }
    for key in settings:
        if key not in types:
            raise InvalidArgumentError(
                f"There is no setting {key!r}. Did you mean {nearest(key, list(types))!r}? There "
                f"are {', '.join(sorted(types))}."
            )
    changes = {key: _parse(key, text, types[key]) for key, text in settings.items()}
    return _with_changes(fit, changes, {})


def _with_changes(
    fit: FitConfig, changes: Mapping[str, Any], kind_changes: Mapping[str, Any]
) -> FitConfig:
    """Change settings; a phase stays as large a share of the one around it, unless it is set.

    A last phase keeps an epoch, and leaves one, of two or more.
    """
    epochs = max(changes.get("epochs", fit.epochs), 0)
    names = ("backbone_epochs", "ramp_epochs", "warmup_epochs")
    phases = {name: getattr(fit, name) * epochs // fit.epochs for name in names}
    kinds = {}
    for name, last_phases in _LAST_PHASES.items():
        settings = getattr(fit, name)
        if settings is None:
            continue
        lengths: dict[str, int] = {}
        before, now = fit.epochs, epochs  # of the phase around
        for last_phase in last_phases:
            length = getattr(settings, last_phase)
            own = max(length * now // before, int(now > 1)) if length else 0
            before, now = length, kind_changes.get(last_phase, own)
            lengths[last_phase] = now
        kinds[name] = replace(settings, **{**kind_changes, **lengths})
    return replace(fit, **{**phases, **kinds, **changes})


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
