"""Options come from the fields of dataclasses, and go back into them."""

import importlib
import inspect
import sys
from dataclasses import dataclass
from typing import Annotated, get_type_hints

import pytest
import typer

from offramp.cli import fields
from offramp.cli.commands import COMMANDS, load_command


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A shape.

    Attributes:
        width_px: Of the shape,
            on ``paper``.
        colour (red|blue): To fill it with.
        secret: Not for the command line.
    """

    width_px: int
    colour: str | None = None
    secret: str = "kept"


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Draw shapes."""

    files: Annotated[list[str], typer.Argument(metavar="FILE...")]
    shape: Annotated[Shape, "secret"] = Shape(width_px=3, secret="given")
    dry: Annotated[bool, typer.Option("--dry", help="Only say what would be drawn.")] = False


@pytest.fixture
def called(monkeypatch):
    got = []
    module = type("module", (), {"draw": got.append})
    monkeypatch.setitem(sys.modules, "offramp.cli.draw", module)
    return got


def test_command_gives_an_instance(called):
    fields.make_command("draw", Draw).main(
        ["a", "b", "--width-px", "7", "--dry"], standalone_mode=False
    )
    assert called == [Draw(files=["a", "b"], shape=Shape(width_px=7, secret="given"), dry=True)]


def test_defaults_are_those_of_the_instance(called):
    fields.make_command("draw", Draw).main(["a"], standalone_mode=False)
    assert called == [Draw(files=["a"])]


def test_help_stands_at_the_fields(capsys):
    fields.make_command("draw", Draw).main(["--help"], standalone_mode=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Draw shapes." in shown
    assert "--width-px <int> Of the shape, on paper. [default: 3]" in shown
    assert "--colour red|blue To fill it with." in shown
    assert "--secret" not in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_command_takes_the_options_that_the_table_names(name):
    module, _, options = COMMANDS[name][0].partition(".")
    function = getattr(importlib.import_module(f"offramp.cli.{name}"), name)
    (parameter,) = inspect.signature(function).parameters
    expected = getattr(importlib.import_module(f"offramp.cli.{module}"), options)
    assert get_type_hints(function)[parameter] is expected


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    options = [p for p in load_command(name).params if p.param_type_name == "option"]
    assert [p.name for p in options if not p.help] == []
