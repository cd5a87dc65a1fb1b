"""The command line: thin shells over the library, one module a command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from offramp import __version__
from offramp.cli.commands import COMMANDS, Commands
from offramp.cli.in_options import in_options
from offramp.errors import OfframpError, missing_extra

app = typer.Typer(
    cls=Commands,
    help="Make neural networks stop early, so that the clock shows the saving.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
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
    except (OfframpError, OSError, ModuleNotFoundError) as error:
        if is_debugging:
            raise
        _fail(_said(error, arguments[0]))
    sys.exit(code if isinstance(code, int) else 0)


def _said(error: OfframpError | OSError | ModuleNotFoundError, command: str) -> str:
    """Say an error in one line."""
    if isinstance(error, OfframpError):
        return in_options(str(error))
    if isinstance(error, ModuleNotFoundError):
        return str(missing_extra(f"offramp {command}", error))
    return f"{error.strerror or error}: {str(error.filename)[:80]}"  # a name too long, a full disk


def _help_of(arguments: list[str]) -> str:
    """The help of the command that was typed, or of all where it is none."""
    return " ".join(["offramp", *(name for name in arguments[:1] if name in COMMANDS), "--help"])


def _fail(message: str) -> None:
    print(f"offramp: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
