"""The commands: the options that each takes, and the line of ``offramp --help`` about it."""

from __future__ import annotations

import importlib
from typing import Any

from typer.core import TyperCommand, TyperGroup

from offramp.cli.fields import make_command

COMMANDS = {
    "recipes": ("options.Recipes", "List the recipes: network, data, figures to expect."),
    "train": ("options.Train", "Train a recipe and leave a run folder."),
    "calibrate": ("calibrate_options.Calibrate", "Choose when to stop, skip or drop."),
    "evaluate": ("options.Evaluate", "Report accuracy, who leaves where, and mean MACs."),
    "frontier": ("options.Frontier", "Draw accuracy against mean MACs."),
    "time": ("options.Time", "Time running less against the plain network."),
    "export": ("options.Export", "Write a bundle that runs without torch."),
    "place": ("options.Place", "Propose where to put exits."),
    "predict": ("options.Predict", "Print what a run says of images or sentences."),
    "show": ("options.Show", "Draw what a run says of an image."),
    "push": ("options.Push", "Send a run to the hub, with a model card."),
    "pull": ("options.Pull", "Fetch a run from the hub into a run folder."),
    "serve": ("server_options.Serve", "Serve a bundle over HTTP and gRPC."),
    "cloud": ("server_options.Cloud", "Serve the stages behind a cut to edge parts."),
    "edge": ("server_options.Edge", "Run the first stages here, and ask the cloud for the rest."),
    "link": ("server_options.Link", "Pass bytes on as a slow or lossy link would."),
    "plan": ("server_options.Plan", "Predict latency and bytes of every cut."),
}
"""In the order of ``offramp --help``, which imports no module of these."""


class Commands(TyperGroup):
    """The commands; the options of one are imported when it is named."""

    def __init__(self, **settings: Any) -> None:
        listed = [TyperCommand(name, help=line) for name, (_, line) in COMMANDS.items()]
        super().__init__(**settings | {"commands": listed})

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is named first."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else load_command(name), rest


def load_command(name: str) -> TyperCommand:
    """Make a command from its options."""
    module, _, options = COMMANDS[name][0].partition(".")
    return make_command(name, getattr(importlib.import_module(f"offramp.cli.{module}"), options))
