"""``offramp serve``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.artifact import is_bundle
from offramp.cli.options import BUNDLE_FOLDER, RunOrBundle
from offramp.errors import ArtifactError, InvalidArgumentError, MissingExtraError

if TYPE_CHECKING:
    from offramp.serving.served import RunnerModel

TOKEN_VARIABLE = "OFFRAMP_TOKEN"
"""Environment variable with the token, where no file is named."""


def serve(
    run: RunOrBundle,
    name: Annotated[
        str | None, typer.Option(help="What clients call it. Default: the run folder's name.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="0 picks a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0 picks a free one, -1 leaves gRPC out.")] = 8001,
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the token that clients must show; else ${TOKEN_VARIABLE}."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads that compute. Default: onnxruntime's choice.")
    ] = None,
    max_payload_mb: Annotated[
        float, typer.Option(help="The most that a request may have, in MiB.")
    ] = 16.0,
    max_batch_rows: Annotated[
        int, typer.Option(help="The most samples that are answered together.")
    ] = 256,
    max_queue_rows: Annotated[
        int, typer.Option(help="Samples that may wait; who comes then is told to try later.")
    ] = 1024,
    max_delay_ms: Annotated[
        float, typer.Option(help="How long a batch waits for more while several come at a time.")
    ] = 2.0,
    grace_s: Annotated[
        float, typer.Option(help="Seconds to answer what waits after a signal to stop.")
    ] = 10.0,
) -> None:
    """Serve a bundle over the Open Inference Protocol V2, HTTP and gRPC; tritonclient speaks it."""
    server = _load_server()
    config = server.ServerConfig(
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
    server.serve([_open_model(find_bundle(run), name, threads)], config)


def _load_server() -> ModuleType:
    """Everything of the extra is imported there."""
    try:
        from offramp.serving import server
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("offramp"):
            raise
        raise MissingExtraError(
            f"offramp serve needs {error.name}, which is not installed: "
            "pip install 'offramp[serve]'"
        ) from error
    return server


def _open_model(folder: Path, name: str | None, threads: int | None) -> RunnerModel:
    from offramp.runtime import Session, read_bundle
    from offramp.serving.served import RunnerModel

    bundle = read_bundle(folder)
    session = Session(bundle, threads=threads)
    return RunnerModel(session, bundle, name=name or _default_name(folder))


def read_token(token_file: Path | None) -> str | None:
    """Find the token that clients must show.

    Args:
        token_file: A file that holds it; None for the environment variable ``OFFRAMP_TOKEN``.
    Returns:
        The token; None if neither is there.
    Raises:
        InvalidArgumentError: If the file cannot be read.
    """
    if token_file is None:
        return os.environ.get(TOKEN_VARIABLE)
    try:
        return token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"Expected a file with a token. {token_file} cannot be read: "
            f"{getattr(error, 'strerror', None) or 'it is no text'}."
        ) from error


def find_bundle(run: Path) -> Path:
    """Find the bundle that RUN names.

    Args:
        run: A bundle, or a run folder with one in it.
    Returns:
        The bundle's folder.
    Raises:
        ArtifactError: If there is none.
    """
    found = next((folder for folder in (run, run / BUNDLE_FOLDER) if is_bundle(folder)), None)
    if found is None:
        raise ArtifactError(
            f"Expected a bundle, or a run folder with one in it. {run} has none. "
            f"Make one: offramp export {run}"
        )
    return found


def _default_name(folder: Path) -> str:
    folder = folder.resolve()
    name = folder.parent.name if folder.name == BUNDLE_FOLDER else folder.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-")[:100] or "model"
