"""The options of each command, and how figures are written.

This module imports nothing heavy: ``offramp COMMAND --help`` and wrong options wait for no torch.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.artifacts import atomic_path
from offramp.errors import InvalidArgumentError

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
RunOrBundle = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a bundle.")]
Repository = Annotated[
    str, typer.Argument(metavar="REPO", help="On the Hugging Face hub, such as user/digits.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Parquet, CSV, JSON lines, or folders of pictures by class; or emnist-balanced; else "
        "$OFFRAMP_DATA/<name>.",
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(help="A split of the data; default what there is of test or validation."),
]
CalibrationSplitOption = Annotated[
    str | None,
    typer.Option(help="For a bundle: a split of --data; default calibration or validation."),
]
SubsetOption = Annotated[
    int | None, typer.Option(metavar="N", help="Only so many samples, drawn evenly by class.")
]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="cpu|cuda", help="Default: cuda where there is one.")
]
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="Write the figures as JSON; - for stdout."),
]
PlainOption = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="A plain network trained as long, to stand beside."),
]
NetworkOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:FUNCTION",
        help="Your file and its function that builds the network, where no recipe does.",
    ),
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads that compute.")]

_MAX_BATCH_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes: network, data, what each shows, figures to expect."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a recipe and leave a run folder."""

    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Default digits-mlp; or --network.")
    ] = None
    network: NetworkOption = None
    exits: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --network: exits to add to a plain backbone."),
    ] = None
    data: DataOption = None
    out: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Folder to make; default runs/RECIPE, or runs/FILE."),
    ] = None
    epochs: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Of weights, order and augmentation; default 0.")
    ] = None
    device: DeviceOption = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on after an interruption.")] = False

    def __post_init__(self) -> None:
        if self.network is not None and self.recipe is not None:
            raise InvalidArgumentError(
                f"Give a recipe or --network. Got {self.recipe} and --network {self.network}."
            )
        if self.network is not None and self.data is None:
            raise InvalidArgumentError("--network trains on your data: give --data PATH.")
        if self.network is None and self.exits is not None:
            raise InvalidArgumentError(
                "--exits is for --network. A recipe's are a setting: --set num_exits=N."
            )


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Report accuracy, who leaves where, which blocks or tokens run, and mean MACs."""

    run: RunOrBundle
    split: Annotated[
        str | None,
        typer.Option(help="A split of the data, or calibration; default the data's last."),
    ] = None
    data: DataOption = None
    subset: SubsetOption = None
    network: NetworkOption = None
    plain: PlainOption = None
    in_sample: Annotated[
        bool, typer.Option("--in-sample", help="Report on data that training or thresholds saw.")
    ] = False
    json_file: JsonOption = None
    device: DeviceOption = None


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """Draw accuracy against mean MACs: thresholds from calibration data, figures from test.

    A run's own policy plays no part. Gates and tokens have no --rule.
    """

    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or bundles, of one data.")
    ]
    split: Annotated[
        str | None, typer.Option(help="The split that judges; default the data's last.")
    ] = None
    data: DataOption = None
    subset: SubsetOption = None
    points: Annotated[
        int, typer.Option(help="Budgets, from the cheapest exit to the plain network.")
    ] = 10
    rule: Annotated[
        str | None,
        typer.Option(
            help="entropy, max_probability, margin, learned; or, of pixels, as calibrate has them."
        ),
    ] = None
    network: NetworkOption = None
    json_file: JsonOption = None
    device: DeviceOption = None


@dataclass(frozen=True, kw_only=True)
class Time:
    """Time running less against the plain network, and against choosing afterwards."""

    run: RunOrBundle
    batch_size: Annotated[
        str | None,
        typer.Option(metavar="B,...", help="Samples a batch; default 1,32,256 as far as they go."),
    ] = None
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="torch, onnxruntime, or both; default torch, for a bundle onnxruntime.",
        ),
    ] = None
    bundle: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What onnxruntime runs; default RUN/bundle."),
    ] = None
    threads: ThreadsOption = None
    steps: Annotated[
        bool,
        typer.Option(
            "--steps",
            help="Only time a bundle's steps on this machine, for offramp plan: writes "
            "BUNDLE/profile.json; needs no data and no torch.",
        ),
    ] = False
    data: DataOption = None
    split: SplitOption = None
    subset: SubsetOption = None
    network: NetworkOption = None
    device: DeviceOption = None
    json_file: JsonOption = None


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a bundle that runs without torch, checked against torch on real samples."""

    run: RunFolder
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to make; default RUN/bundle.")
    ] = None
    quantize: Annotated[
        str | None, typer.Option(metavar="int8", help="Weights in int8 instead of float32.")
    ] = None
    plain: Annotated[
        bool, typer.Option(help="Add the plain network, to time a device's own baseline.")
    ] = True
    layers_per_step: Annotated[
        int, typer.Option(help="Where tokens halt: layers that run before they are dropped.")
    ] = 1
    data: DataOption = None
    network: NetworkOption = None

    def __post_init__(self) -> None:
        if self.quantize not in (None, "int8"):
            raise InvalidArgumentError(f"--quantize must be int8. Got {self.quantize!r}.")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Propose where to put exits: cuts that share the backbone's time out evenly."""

    backbone: Annotated[str, typer.Argument(metavar="BACKBONE", help="A recipe, or a run folder.")]
    num_exits: Annotated[int, typer.Option(help="Exits, the final one counted.")]
    batch_size: Annotated[int, typer.Option(help="Samples a batch.")] = 1
    threads: ThreadsOption = None
    network: NetworkOption = None
    json_file: JsonOption = None

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= _MAX_BATCH_SIZE:
            raise InvalidArgumentError(
                f"--batch-size must be an int in [1, {_MAX_BATCH_SIZE}]. Got {self.batch_size}."
            )


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Print label and probability, confidence, exit, blocks or tokens, and share of plain MACs."""

    run: RunOrBundle
    samples: Annotated[
        list[str], typer.Argument(metavar="FILE|TEXT...", help="Upright images, or sentences.")
    ]
    network: NetworkOption = None
    device: DeviceOption = None


@dataclass(frozen=True, kw_only=True)
class Show:
    """Draw an image: layers before each token halts, or each exit's map of classes.

    A bundle draws its maps; which tokens halt takes the run.
    """

    run: RunOrBundle
    image: Annotated[Path, typer.Option(metavar="FILE", help="An upright image.")]
    out: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="To write; default FILE-depth.png or -exits.png, here."),
    ] = None
    device: DeviceOption = None

    def __post_init__(self) -> None:
        if self.out is not None and self.out.suffix.lower() != ".png":
            raise InvalidArgumentError(f"--out must name a .png file. Got {self.out}.")


@dataclass(frozen=True, kw_only=True)
class Push:
    """Evaluate on test and send to the hub, with a model card that says what came out."""

    run: RunOrBundle
    repo_id: Repository
    private: Annotated[bool, typer.Option("--private", help="Only you shall see it.")] = False
    evaluates: Annotated[
        bool,
        typer.Option("--evaluate/--no-evaluate", help="Measure on test for the model card."),
    ] = True
    data: DataOption = None
    split: SplitOption = None
    subset: SubsetOption = None
    network: NetworkOption = None
    plain: PlainOption = None


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Fetch a run, or a bundle, from the hub into a folder."""

    repo_id: Repository
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder to make; default runs/NAME.")
    ] = None
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; default the main branch.")
    ] = None


def write_figures(content: dict[str, Any], destination: str) -> None:
    """Write figures as JSON."""
    text = json.dumps(content, indent=2)
    if destination == "-":
        sys.stdout.write(text + "\n")
        return
    with atomic_path(Path(destination)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
