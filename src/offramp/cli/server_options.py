"""Options of the commands that serve, and the server's configuration from them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.artifacts import BUNDLE_FOLDER
from offramp.errors import InvalidArgumentError, MissingExtraError

if TYPE_CHECKING:
    from offramp.serving.server import ServerConfig

TOKEN_VARIABLE = "OFFRAMP_TOKEN"
"""Environment variable with the token, where no file is named."""

NameOption = Annotated[
    str | None, typer.Option(help="What clients call the model. Default: the run folder's name.")
]
HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
HttpPortOption = Annotated[int, typer.Option(help="0 picks a free one.")]
GrpcPortOption = Annotated[int, typer.Option(help="0 picks a free one, -1 leaves gRPC out.")]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(help=f"File with the token that clients must show; else ${TOKEN_VARIABLE}."),
]
TlsCertOption = Annotated[Path | None, typer.Option(help="Certificate, PEM.")]
TlsKeyOption = Annotated[Path | None, typer.Option(help="Its key, PEM.")]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Threads that compute. Default: onnxruntime's choice.")
]
MaxPayloadOption = Annotated[float, typer.Option(help="The most that a request may have, in MiB.")]
MaxBatchOption = Annotated[int, typer.Option(help="The most samples that are answered together.")]
MaxQueueOption = Annotated[
    int, typer.Option(help="Samples that may wait; who comes then is told to try later.")
]
MaxDelayOption = Annotated[
    float, typer.Option(help="How long a batch waits for more while several come at a time.")
]
GraceOption = Annotated[
    float, typer.Option(help="Seconds to answer what waits after a signal to stop.")
]


@contextmanager
def needs_extra(command: str, extra: str) -> Iterator[None]:
    """Say which extra to install where a package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("offramp"):
            raise
        raise MissingExtraError(
            f"offramp {command} needs {error.name}, which is not installed: "
            f"pip install 'offramp[{extra}]'"
        ) from error


def server_config(
    *,
    host: str,
    http_port: int,
    grpc_port: int,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    max_payload_mb: float = 16.0,
    max_batch_rows: int = 256,
    max_queue_rows: int,
    max_delay_ms: float = 2.0,
    grace_s: float = 10.0,
) -> ServerConfig:
    """The server's configuration."""
    from offramp.serving.server import ServerConfig

    return ServerConfig(
        host=host,
        http_port=http_port,
        grpc_port=None if grpc_port == -1 else grpc_port,
        token=read_token(token_file),
        tls_cert=tls_cert,
        tls_key=tls_key,
        max_payload_bytes=int(max_payload_mb * 2**20),
        max_batch_rows=max_batch_rows,
        max_queue_rows=max_queue_rows,
        max_delay_ms=max_delay_ms,
        grace_s=grace_s,
    )


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


def default_name(folder: Path) -> str:
    """What clients call a model that nobody named."""
    folder = folder.resolve()
    name = folder.parent.name if folder.name == BUNDLE_FOLDER else folder.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:100] or "model"
