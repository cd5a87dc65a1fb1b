"""``offramp cloud``, ``offramp edge`` and ``offramp link``: one network over several machines."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.options import RunOrBundle
from offramp.cli.server_options import (
    GraceOption,
    GrpcPortOption,
    HostOption,
    HttpPortOption,
    MaxBatchOption,
    MaxDelayOption,
    MaxPayloadOption,
    MaxQueueOption,
    NameOption,
    ThreadsOption,
    TlsCertOption,
    TlsKeyOption,
    TokenFileOption,
    default_name,
    needs_extra,
    read_token,
    server_config,
)
from offramp.errors import AuthenticationError, InvalidArgumentError, OffloadError
from offramp.workflow.artifact import find_bundle

if TYPE_CHECKING:
    from offramp.offload.edge import EdgeRunner
    from offramp.offload.proxy import LinkProxy
    from offramp.runtime import Bundle
    from offramp.serving.server import ServerConfig

CLOUD_TOKEN_VARIABLE = "OFFRAMP_CLOUD_TOKEN"
"""Environment variable with the token that the cloud asks for, where no file is named."""
_EVERYTHING_BEHIND = -1
_FIRST_LOOK_S = 5.0


def cloud(
    run: RunOrBundle,
    split_after: Annotated[
        int, typer.Option(help="Last stage on the edge; -1 serves what is behind every cut.")
    ] = _EVERYTHING_BEHIND,
    name: NameOption = None,
    host: HostOption = "127.0.0.1",
    http_port: HttpPortOption = 8000,
    grpc_port: GrpcPortOption = 8001,
    token_file: TokenFileOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    threads: ThreadsOption = None,
    max_payload_mb: MaxPayloadOption = 16.0,
    max_batch_rows: MaxBatchOption = 256,
    max_queue_rows: MaxQueueOption = 1024,
    max_delay_ms: MaxDelayOption = 2.0,
    grace_s: GraceOption = 10.0,
) -> None:
    """Serve the stages behind a cut to edge parts that have the same bundle."""
    with needs_extra("cloud", "serve"):
        from offramp.offload.cloud import cloud_models
        from offramp.serving import server
    from offramp.runtime import read_bundle
    from offramp.runtime.part import PartSession, cuts

    config = server_config(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        token_file=token_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        max_payload_mb=max_payload_mb,
        max_batch_rows=max_batch_rows,
        max_queue_rows=max_queue_rows,
        max_delay_ms=max_delay_ms,
        grace_s=grace_s,
    )
    bundle = read_bundle(find_bundle(run))
    behind = cuts(bundle)[:-1]
    if split_after not in behind:
        raise InvalidArgumentError(
            f"--split-after must be one of {', '.join(map(str, behind))}, the cuts of "
            f"{bundle.folder} with something behind them. Got {split_after}."
        )
    session = PartSession(bundle, starts_after=split_after, threads=threads)
    server.serve(cloud_models(session, name or default_name(bundle.folder)), config)


def edge(
    run: RunOrBundle,
    cloud: Annotated[str, typer.Option(metavar="URL", help="Where offramp cloud serves.")],
    split_after: Annotated[int, typer.Option(help="Last stage that runs here.")],
    starts_after: Annotated[
        int, typer.Option(help="On a machine between two others: the stage before its first.")
    ] = _EVERYTHING_BEHIND,
    codec: Annotated[
        str, typer.Option(help="How features cross: float32, float16, int8 or int8+zstd.")
    ] = "float32",
    deadline_ms: Annotated[
        float, typer.Option(help="After so long the best answer from here is given.")
    ] = 1000.0,
    cloud_token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the cloud's token; else ${CLOUD_TOKEN_VARIABLE}."),
    ] = None,
    cloud_ca: Annotated[
        Path | None, typer.Option(help="Certificates to trust for https, PEM.")
    ] = None,
    name: NameOption = None,
    host: HostOption = "127.0.0.1",
    http_port: HttpPortOption = 8010,
    grpc_port: GrpcPortOption = -1,
    token_file: TokenFileOption = None,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    threads: ThreadsOption = None,
    max_queue_rows: MaxQueueOption = 1024,
) -> None:
    """Run the first stages here, ask the cloud for the rest, and serve the whole model."""
    with needs_extra("edge", "serve"):
        from offramp.offload.edge import EdgeConfig
        from offramp.serving import server  # noqa: F401 - to say at once what is missing
    from offramp.runtime import read_bundle

    config = server_config(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        token_file=token_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        max_queue_rows=max_queue_rows,
    )
    bundle = read_bundle(find_bundle(run))
    called = name or default_name(bundle.folder)
    runner = _connect(
        bundle,
        called,
        cloud,
        split_after=split_after,
        starts_after=starts_after,
        config=EdgeConfig(codec=codec, deadline_ms=deadline_ms),
        token=read_token(cloud_token_file, CLOUD_TOKEN_VARIABLE),
        ca_file=cloud_ca,
        threads=threads,
    )
    _serve_part(runner, called, config)


def _serve_part(runner: EdgeRunner, name: str, config: ServerConfig) -> None:
    """Serve the whole model, or, on a machine between two others, what is behind a cut."""
    from offramp.offload.cloud import middle_model
    from offramp.serving.served import RunnerModel
    from offramp.serving.server import serve

    is_first = runner.starts_after == _EVERYTHING_BEHIND
    try:
        whole = partial(RunnerModel, runner, runner.bundle, keeps_deadlines=True)
        serve([whole(name=name) if is_first else middle_model(runner, name)], config)
    finally:
        runner.close()


def _connect(
    bundle: Bundle,
    name: str,
    url: str,
    *,
    token: str | None,
    ca_file: Path | None,
    split_after: int,
    **options: object,
) -> EdgeRunner:
    """An edge part with a link to a cloud; one that is not there yet may come later."""
    from offramp.offload.edge import EdgeRunner
    from offramp.offload.http_link import HttpLink

    link = HttpLink(url, bundle, name=name, split_after=split_after, token=token, ca_file=ca_file)
    try:
        runner = EdgeRunner(bundle, split_after=split_after, link=link, **options)  # type: ignore[arg-type]
        try:
            link.check(timeout_s=_FIRST_LOOK_S)
        except AuthenticationError:
            raise
        except OffloadError as error:
            print(f"offramp: the cloud is not there yet: {error}", file=sys.stderr)
    except BaseException:
        link.close()
        raise
    return runner


def link(
    to: Annotated[str, typer.Option(metavar="HOST:PORT", help="The other end.")],
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 8100,
    host: HostOption = "127.0.0.1",
    mbit: Annotated[float | None, typer.Option(help="Megabits a second, each way.")] = None,
    rtt_ms: Annotated[float, typer.Option(help="There and back, for the first byte.")] = 0.0,
    drop: Annotated[
        float, typer.Option(help="Share of packets that are lost, and come again.")
    ] = 0.0,
    stall_ms: Annotated[float, typer.Option(help="Until a lost packet comes again.")] = 200.0,
    seed: Annotated[int, typer.Option(help="Of the packets that are lost.")] = 0,
) -> None:
    """Pass bytes on as a slow or lossy link would, for trials on one machine."""
    import asyncio

    from offramp.offload.proxy import LinkProxy, LinkShape

    far_host, _, far_port = to.rpartition(":")
    if not far_host or not far_port.isdigit():
        raise InvalidArgumentError(
            f"--to must be HOST:PORT, for example 127.0.0.1:8000. Got {to!r}."
        )
    shape = LinkShape(mbit=mbit, rtt_ms=rtt_ms, drop=drop, stall_ms=stall_ms)
    proxy = LinkProxy(far_host, int(far_port), shape, listen_host=host, listen_port=port, seed=seed)
    asyncio.run(_carry(proxy, host, to))


async def _carry(proxy: LinkProxy, host: str, to: str) -> None:
    """Pass bytes on until a signal comes, then say how many."""
    import asyncio
    import signal

    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with proxy:
        print(f"a link from {host}:{proxy.port} to {to}", flush=True)
        await stopping.wait()
    print(f"{proxy.carried_bytes} bytes crossed it")
