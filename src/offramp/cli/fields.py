"""Commands from dataclasses: a field is an option, and its help stands at the field."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import ParameterInfo

Options = type[Any]
"""A frozen keyword-only dataclass.

A field's help is that of its ``typer.Option``, or else that of the class's ``Attributes``, where
``name (METAVAR): help`` also says what to give. A field that is a dataclass stands for the fields
in it, except those that its annotation names: ``Annotated[ServerConfig, "token"]``.
"""


def make_command(name: str, options: Options) -> TyperCommand:
    """Make a command that gives ``options`` to the function ``offramp.cli.NAME.NAME``.

    Its module is imported last: ``--help`` and wrong options do not wait for it.
    """

    def run(**values: Any) -> None:
        asked = _build(options, values)
        getattr(importlib.import_module(f"offramp.cli.{name}"), name)(asked)

    parameters = _parameters(options)
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, help=inspect.getdoc(options))(run)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


def _parameters(options: Options, given: Any = MISSING) -> list[inspect.Parameter]:
    """The parameters of a command; their defaults are those of ``given`` where it is there."""
    documented = dict(_documented(options))
    found: list[inspect.Parameter] = []
    for name, hint, default, notes in _fields(options, given):
        if isinstance(hint, type) and is_dataclass(hint):
            found += [p for p in _parameters(hint, default) if p.name not in notes]
            continue
        if not any(isinstance(note, ParameterInfo) for note in notes):
            notes = [documented.get(name, typer.Option())]
        found.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=Annotated[hint, notes[0]],
            )
        )
    return found


def _build(options: Options, values: dict[str, Any], given: Any = MISSING) -> Any:
    """Make an instance, and those in it, of the values of all options."""
    chosen = {}
    for name, hint, default, notes in _fields(options, given):
        if isinstance(hint, type) and is_dataclass(hint):
            inner = {key: value for key, value in values.items() if key not in notes}
            chosen[name] = _build(hint, inner, default)
        elif name in values:
            chosen[name] = values[name]
    return options(**chosen) if given is MISSING else replace(given, **chosen)


def _fields(options: Options, given: Any) -> Iterator[tuple[str, Any, Any, list[Any]]]:
    """Each field's name, type and default, and what an ``Annotated`` says besides."""
    hints = get_type_hints(options, include_extras=True)
    for field in fields(options):
        hint = hints[field.name]
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else [hint]
        default = field.default if given is MISSING else getattr(given, field.name)
        yield field.name, kind, default, notes


def _documented(options: Options) -> Iterator[tuple[str, Any]]:
    """Each field that the class's docstring describes, as an option."""
    _, _, listed = (inspect.getdoc(options) or "").partition("Attributes:\n")
    entry = r"^    (\w+)(?: \((.+?)\))?: (.+(?:\n {8,}.+)*)"
    for name, metavar, text in re.findall(entry, listed, re.MULTILINE):
        help_text = " ".join(text.replace("``", "").split())
        yield name, typer.Option(metavar=metavar or None, help=help_text)
