"""The command line: thin shells over the library, one module a group of commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from offramp import __version__
from offramp.cli import (
    calibrate,
    evaluate,
    export,
    frontier,
    place,
    plan,
    predict,
    push,
    serve,
    show,
    split,
    time,
    train,
)
from offramp.cli.in_options import in_options
from offramp.errors import OfframpError

app = typer.Typer(
    help="Make neural networks stop early, so that the clock shows the saving.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("recipes")(train.recipes)
app.command("train")(train.train)
app.command("calibrate")(calibrate.calibrate)
app.command("evaluate")(evaluate.evaluate)
app.command("frontier")(frontier.frontier)
app.command("time")(time.time)
app.command("export")(export.export)
app.command("place")(place.place)
app.command("predict")(predict.predict)
app.command("show")(show.show)
app.command("push")(push.push)
app.command("pull")(push.pull)
app.command("serve")(serve.serve)
app.command("cloud")(split.cloud)
app.command("edge")(split.edge)
app.command("link")(split.link)
app.command("plan")(plan.plan)


_INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of the signal."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"offramp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command; ``main`` reads --debug itself."""


def main() -> None:
    """Run a command; an error is one line on stderr and exit code 2 (``--debug``: a traceback)."""
    is_debugging = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments or ["--help"], standalone_mode=False)
        if code == _INTERRUPTED:
            raise Abort
    except Abort:
        print("offramp: interrupted; training goes on with --resume", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except TyperException as error:
        words = error.format_message()
        _fail(f"{words}{'' if words.endswith(('.', '?')) else '.'} See: {_help_of(arguments)}")
    except OfframpError as error:
        if is_debugging:
            raise
        _fail(in_options(str(error)))
    except OSError as error:  # a name too long, a disk that is full
        if is_debugging:
            raise
        _fail(f"{error.strerror or error}: {str(error.filename)[:80]}")
    except ModuleNotFoundError as error:
        if is_debugging or (error.name or "").startswith("offramp"):
            raise
        _fail(f"This command needs {error.name}: pip install 'offramp[train]'")
    sys.exit(code if isinstance(code, int) else 0)


def _help_of(arguments: list[str]) -> str:
    """The help of the command that was typed, or of all where it is none."""
    commands = [command.name for command in app.registered_commands]
    return " ".join(["offramp", *(name for name in arguments[:1] if name in commands), "--help"])


def _fail(message: str) -> None:
    print(f"offramp: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
