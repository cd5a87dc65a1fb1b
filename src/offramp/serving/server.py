"""One server, two protocols: how it is set up, started and stopped."""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from aiohttp import web

from offramp.errors import InvalidArgumentError
from offramp.serving.config import ServerConfig
from offramp.serving.grpc_api import make_handler
from offramp.serving.http_api import make_app
from offramp.serving.served import ServedModel
from offramp.serving.service import Service

__all__ = ["Server", "ServerConfig", "serve"]

_MESSAGE_ROOM = 1 << 16
"""Bytes of a gRPC message beside its tensors."""
_MOST_PAYLOADS = 16
"""Requests of the largest size that may be in memory at a time."""
_LAST_WORDS_S = 0.5
"""Seconds in which open connections still refuse requests in words, before they close."""
_unlogged = logging.getLogger(f"{__name__}.unlogged")
_unlogged.setLevel(logging.CRITICAL + 1)
"""Logger of aiohttp for bytes that are no HTTP: clients are told, and could fill a log."""


class Server:
    """Serves models over HTTP and gRPC.

    Args:
        models: What is served; their names must differ.
        config: How.
    Raises:
        InvalidArgumentError: If the certificate or the key cannot be read.
    """

    def __init__(self, models: Sequence[ServedModel], config: ServerConfig) -> None:
        self._models, self._config = models, config
        self._tls = None if config.tls_cert is None else _read_tls(config)
        self._service: Service | None = None
        self._http: web.AppRunner | None = None
        self._grpc: grpc.aio.Server | None = None
        self.http_port = 0
        """The port that HTTP listens on, once started."""
        self.grpc_port: int | None = None
        """The port that gRPC listens on, once started; None for no gRPC."""

    @property
    def addresses(self) -> str:
        """Address for clients, for people to read."""
        config = self._config
        host = f"[{config.host}]" if ":" in config.host else config.host
        secure = "s" if self._tls else ""
        http = f"http{secure}://{host}:{self.http_port}"
        return (
            http if self.grpc_port is None else f"{http} and grpc{secure}://{host}:{self.grpc_port}"
        )

    async def start(self) -> None:
        """Begin to listen.

        Raises:
            InvalidArgumentError: If a port is in use or the host is not this machine's, or there is
                no model, or two of one name.
        """
        config = self._config
        self._service = Service(
            self._models,
            token=config.token,
            max_batch_rows=config.max_batch_rows,
            max_queue_rows=config.max_queue_rows,
            max_delay_ms=config.max_delay_ms,
            max_held_bytes=_MOST_PAYLOADS * config.max_payload_bytes,
        )
        try:
            await self._start_http(self._service)
            if config.grpc_port is not None:
                await self._start_grpc(self._service, config.grpc_port)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Be ready no more, refuse new work, answer what waits within the grace, and close."""
        if self._service is not None:
            await self._service.close(self._config.grace_s)
            await asyncio.sleep(_LAST_WORDS_S)
        if self._grpc is not None:
            await self._grpc.stop(grace=1.0)
        if self._http is not None:
            await self._http.cleanup()

    async def _start_http(self, service: Service) -> None:
        config = self._config
        app = make_app(service, config.max_payload_bytes)
        self._http = web.AppRunner(
            app,
            access_log=None,
            logger=_unlogged,
            auto_decompress=False,
            handler_cancellation=True,
            shutdown_timeout=1.0,
        )
        await self._http.setup()
        context = None
        if self._tls is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(str(config.tls_cert), str(config.tls_key))
        site = web.TCPSite(self._http, config.host, config.http_port, ssl_context=context)
        try:
            await site.start()
        except OSError as error:
            raise _cannot_listen(config.host, config.http_port, "http", error) from error
        self.http_port = self._http.addresses[0][1]

    async def _start_grpc(self, service: Service, port: int) -> None:
        config = self._config
        self._grpc = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", config.max_payload_bytes + _MESSAGE_ROOM),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # else a second server would share the port unnoticed
            ]
        )
        self._grpc.add_generic_rpc_handlers((make_handler(service, config.max_payload_bytes),))
        host = f"[{config.host}]" if ":" in config.host else config.host
        try:
            if self._tls is None:
                self.grpc_port = self._grpc.add_insecure_port(f"{host}:{port}")
            else:
                credentials = grpc.ssl_server_credentials([self._tls])
                self.grpc_port = self._grpc.add_secure_port(f"{host}:{port}", credentials)
        except RuntimeError as error:
            self._grpc = None
            raise _cannot_listen(config.host, port, "grpc", error) from error
        await self._grpc.start()


def serve(models: Sequence[ServedModel], config: ServerConfig) -> None:
    """Serve until a signal comes: SIGTERM or SIGINT.

    Prints a line when it is ready, and a warning where other machines may ask without a token.

    Args:
        models: What is served; their names must differ.
        config: How.
    Raises:
        InvalidArgumentError: If it cannot listen, or the models or certificates are wrong.
    """
    if config.is_open_to_others:
        print(
            f"offramp: warning: {config.host} is open to other machines and no token is asked for; "
            "set --token-file or OFFRAMP_TOKEN",
            file=sys.stderr,
        )
    asyncio.run(_serve(Server(models, config), [model.name for model in models]))


async def _serve(server: Server, names: Sequence[str]) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    await server.start()
    print(f"serving {', '.join(names)} at {server.addresses}", flush=True)
    await stopping.wait()
    await server.stop()


def _read_tls(config: ServerConfig) -> tuple[bytes, bytes]:
    """Key and certificate, as gRPC takes them."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            str(config.tls_cert), str(config.tls_key), password=_no_passphrase
        )
        return Path(str(config.tls_key)).read_bytes(), Path(str(config.tls_cert)).read_bytes()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise InvalidArgumentError(
            f"Expected a certificate and its key as PEM files without a passphrase in "
            f"{config.tls_cert} and {config.tls_key}. Got: {error}."
        ) from error


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")


def _cannot_listen(host: str, port: int, protocol: str, error: Exception) -> InvalidArgumentError:
    why = getattr(error, "strerror", None) or "the port is in use, or the host is not this machine"
    return InvalidArgumentError(
        f"Cannot listen on port {port} of {host}: {why}. Choose another: --{protocol}-port N, 0 "
        "for a free one."
    )
