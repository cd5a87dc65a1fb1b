"""The options of the commands that serve, or that cut a network over several machines."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from offramp.artifacts import BUNDLE_FOLDER
from offramp.cli.options import (
    CalibrationSplitOption,
    DataOption,
    JsonOption,
    RunOrBundle,
    SubsetOption,
)
from offramp.errors import InvalidArgumentError
from offramp.offload.edge import EdgeConfig
from offramp.offload.plan import LinkTerms
from offramp.offload.proxy import LinkShape
from offramp.serving.config import ServerConfig

TOKEN_VARIABLE = "OFFRAMP_TOKEN"
"""Environment variable with the token, where no file is named."""
CLOUD_TOKEN_VARIABLE = "OFFRAMP_CLOUD_TOKEN"
"""Environment variable with the token that the cloud asks for, where no file is named."""
EVERYTHING_BEHIND = -1
"""The cut before the first stage."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The options of every command that serves."""

    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model. Default: the run folder's name."),
    ] = None
    listening: Annotated[ServerConfig, "grpc_port", "token", "max_payload_bytes"]
    grpc_port: Annotated[int, typer.Option(help="0 picks a free one, -1 leaves gRPC out.")] = 8001
    max_payload_mb: Annotated[
        float, typer.Option(help="The most that a request may have, in MiB.")
    ] = 16.0
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the token that clients must show; else ${TOKEN_VARIABLE}."),
    ] = None
    threads: Annotated[
        int | None, typer.Option(help="Threads that compute. Default: onnxruntime's choice.")
    ] = None

    @property
    def config(self) -> ServerConfig:
        """The server's settings."""
        return replace(
            self.listening,
            grpc_port=None if self.grpc_port == -1 else self.grpc_port,
            token=read_token(self.token_file),
            max_payload_bytes=int(self.max_payload_mb * 2**20),
        )

    def name_of(self, folder: Path) -> str:
        """Name the model in a folder, for clients."""
        if self.name:
            return self.name
        folder = folder.resolve()
        name = folder.parent.name if folder.name == BUNDLE_FOLDER else folder.name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:100] or "model"


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a bundle over the Open Inference Protocol V2, HTTP and gRPC; tritonclient speaks it."""

    run: RunOrBundle
    server: Server


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Serve the stages behind a cut to edge parts that have the same bundle."""

    run: RunOrBundle
    split_after: Annotated[
        int, typer.Option(help="Last stage on the edge; -1 serves what is behind every cut.")
    ] = EVERYTHING_BEHIND
    server: Server


@dataclass(frozen=True, kw_only=True)
class Edge:
    """Run the first stages here, ask the cloud for the rest, and serve the whole model."""

    run: RunOrBundle
    cloud: Annotated[str, typer.Option(metavar="URL", help="Where offramp cloud serves.")]
    split_after: Annotated[int, typer.Option(help="Last stage that runs here.")]
    starts_after: Annotated[
        int, typer.Option(help="On a machine between two others: the stage before its first.")
    ] = EVERYTHING_BEHIND
    offloading: EdgeConfig
    cloud_token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the cloud's token; else ${CLOUD_TOKEN_VARIABLE}."),
    ] = None
    cloud_ca: Annotated[Path | None, typer.Option(help="Certificates to trust for https, PEM.")] = (
        None
    )
    server: Server = Server(grpc_port=-1, listening=ServerConfig(http_port=8010))


@dataclass(frozen=True, kw_only=True)
class Link:
    """Pass bytes on as a slow or lossy link would, for trials on one machine."""

    to: Annotated[str, typer.Option(metavar="HOST:PORT", help="The other end.")]
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 8100
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    shape: LinkShape
    seed: Annotated[int, typer.Option(help="Of the packets that are lost.")] = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predict latency and bytes of every cut, all on the edge and all in the cloud included."""

    run: RunOrBundle
    link: LinkTerms
    codec: Annotated[
        str, typer.Option(help="How features cross: float32, float16, int8 or int8+zstd.")
    ] = "int8+zstd"
    edge_profile: Annotated[
        Path | None,
        typer.Option(help="What offramp time BUNDLE --steps wrote on the edge; else this machine."),
    ] = None
    cloud_profile: Annotated[
        Path | None, typer.Option(help="The same of the cloud; else this machine.")
    ] = None
    edge_ms: Annotated[
        float | None,
        typer.Option(help="Take the edge to need so long for all its stages, in this proportion."),
    ] = None
    threads: Annotated[int | None, typer.Option(help="Threads that compute here.")] = None
    picture: Annotated[Path | None, typer.Option(help="Draw the cuts, a PNG.")] = None
    data: DataOption = None
    split: CalibrationSplitOption = None
    subset: SubsetOption = None
    json_file: JsonOption = None

    def __post_init__(self) -> None:
        if self.edge_ms is not None and not self.edge_ms > 0:
            raise InvalidArgumentError(f"--edge-ms must be a number above 0. Got {self.edge_ms}.")
        if self.picture is not None and self.picture.suffix.lower() != ".png":
            raise InvalidArgumentError(f"--picture must be a PNG file. Got {self.picture}.")


def read_token(token_file: Path | None, variable: str = TOKEN_VARIABLE) -> str | None:
    """Find a token."""
    if token_file is None:
        return os.environ.get(variable)
    try:
        return token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"Expected a file with a token. {token_file} cannot be read: "
            f"{getattr(error, 'strerror', None) or 'it is no text'}."
        ) from error
