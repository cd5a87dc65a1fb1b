"""The link over a network: the V2 protocol over HTTP, tensors as bytes, on pooled connections."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import re
import ssl
import threading
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import aiohttp
import numpy.typing as npt
import zstandard

from offramp.errors import (
    ArtifactError,
    AuthenticationError,
    InvalidArgumentError,
    LinkTimeoutError,
    OffloadError,
    OfframpError,
    PayloadError,
    ServerBusyError,
    reason,
)
from offramp.offload.link import Reply
from offramp.offload.naming import identity, part_name
from offramp.runtime.bundle import Bundle
from offramp.serving.http_client import read_answer, write_request
from offramp.serving.tokens import check_token

Array = npt.NDArray[Any]
Result = TypeVar("Result")

_ZSTD_LEVEL = 1
"""Higher ones take longer than what they save takes to send at 10 Mbit/s."""
_MOST_ANSWER_BYTES = 64 * 2**20
_TIMEOUTS = (TimeoutError, asyncio.TimeoutError, concurrent.futures.TimeoutError)
"""One and the same from Python 3.11 on."""
_HANDED_OVER_S = 0.05
"""Beyond a call's own time limit, for it to pass from one thread to the other."""


class _Response(NamedTuple):
    """Answer to a call, to be read by whoever called."""

    content: bytes
    header_length: str | None
    sent_bytes: int
    received_bytes: int


class HttpLink:
    """A link to what is behind a cut, on a server such as ``offramp cloud``.

    Connections are kept and used again. All of a call, connecting included, ends within its time
    limit. Several threads may use a link at once.

    Args:
        url: Of the server, for example ``http://cloud:8000``.
        bundle: What this part runs; the server must have the same.
        name: What the whole model is called there.
        split_after: The last stage before the link.
        token: The server's bearer token; None if it wants none.
        ca_file: Certificates to trust for https, in PEM; the system's if None.
    Raises:
        InvalidArgumentError: If the address is none.
    """

    def __init__(
        self,
        url: str,
        bundle: Bundle,
        *,
        name: str,
        split_after: int,
        token: str | None = None,
        ca_file: Path | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidArgumentError(
                f"The 'url' parameter must be an address such as http://cloud:8000. Got {url!r}."
            )
        check_token(token)
        model, version = part_name(name, split_after), identity(bundle)
        self._path = f"{url.rstrip('/')}/v2/models/{model}/versions/{version}"
        self._where = f"{model} of version {version} at {_without_password(url)}"
        # Logits hardly compress, and bytes are counted as they come.
        self._headers = {"Accept-Encoding": "identity"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._ssl = True if ca_file is None else ssl.create_default_context(cafile=ca_file)
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._is_closed = False
        self._closing = threading.Lock()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="offramp-link", daemon=True
        )
        self._thread.start()

    def send(
        self, inputs: Mapping[str, Array], *, timeout_s: float, compresses: bool = False
    ) -> Reply:
        """See :meth:`offramp.offload.link.Link.send`."""
        end = time.perf_counter() + timeout_s
        # The server need not begin what nobody waits for any more.
        body, header_length = write_request(inputs, {"deadline_ms": 1e3 * timeout_s})
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(header_length),
        }
        if compresses:
            body = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(body)
            headers["Content-Encoding"] = "zstd"
        response = self._within(end - time.perf_counter(), self._infer(body, headers))
        outputs = read_answer(
            response.content, response.header_length, max_bytes=_MOST_ANSWER_BYTES
        )
        return Reply(
            outputs=outputs,
            sent_bytes=response.sent_bytes,
            received_bytes=response.received_bytes,
        )

    def check(self, *, timeout_s: float) -> None:
        """See :meth:`offramp.offload.link.Link.check`."""
        self._within(timeout_s, self._ready())

    def close(self) -> None:
        """Give up what is under way, and close the connections."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._let_go(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _within(self, timeout_s: float, call: Coroutine[Any, Any, Result]) -> Result:
        """Run a call on the link's own thread, and say in our words what went wrong."""
        with self._closing:
            if self._is_closed or timeout_s <= 0:
                call.close()
                raise OffloadError("The link is closed.") if self._is_closed else self._late(0.0)
            future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(call, timeout_s), self._loop)
        try:
            return future.result(timeout_s + _HANDED_OVER_S)
        except OfframpError:
            raise
        except _TIMEOUTS as error:
            future.cancel()
            raise self._late(timeout_s) from error
        # Whatever it is, the caller has an answer of its own to give.
        except (Exception, concurrent.futures.CancelledError) as error:
            raise OffloadError(f"Cannot reach {self._where}: {reason(error)}") from error

    def _late(self, timeout_s: float) -> LinkTimeoutError:
        return LinkTimeoutError(
            f"Expected an answer of {self._where} within {1e3 * timeout_s:.0f} ms. Got none."
        )

    async def _let_go(self) -> None:
        mine = asyncio.current_task()
        calls = [task for task in asyncio.all_tasks() if task is not mine]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _infer(self, body: bytes, headers: Mapping[str, str]) -> _Response:
        session = self._open_session()
        # As a file, which aiohttp sends piece by piece.
        data = io.BytesIO(body)
        async with session.post(
            f"{self._path}/infer", data=data, headers=headers, allow_redirects=False
        ) as response:
            content = await _read_capped(response)
            self._check_status(response.status, content)
            request = response.request_info
            line = f"{request.method} {request.url.raw_path} HTTP/1.1\r\n"
            return _Response(
                content=content,
                header_length=response.headers.get("Inference-Header-Content-Length"),
                sent_bytes=len(line) + _header_bytes(request.headers) + len(body),
                received_bytes=len(f"HTTP/1.1 {response.status} {response.reason}\r\n")
                + _header_bytes(response.headers)
                + len(content),
            )

    async def _ready(self) -> None:
        ready = self._open_session().get(f"{self._path}/ready", allow_redirects=False)
        async with ready as response:
            content = await _read_capped(response)
            try:
                self._check_status(response.status, content)
            except PayloadError as error:  # nothing was sent that could be wrong: it is stopping
                raise OffloadError(str(error)) from error

    def _open_session(self) -> aiohttp.ClientSession:
        """The pool of connections, which belongs to the link's thread."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._ssl),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._session

    def _check_status(self, status: int, content: bytes) -> None:
        if status == 200:
            return
        said = repr(content[:200].decode(errors="replace"))
        kinds: dict[int, type[OfframpError]] = {
            401: AuthenticationError,
            404: ArtifactError,
            503: ServerBusyError,
            504: LinkTimeoutError,
        }
        is_refusal = 400 <= status < 500
        kind = kinds.get(status, PayloadError if is_refusal else OffloadError)
        if status == 404:
            said += " Both machines need the same bundle: export once and copy it."
        raise kind(f"Asked for {self._where}, the server answered {status}: {said}")


def _without_password(url: str) -> str:
    """The address as it may stand in messages."""
    return re.sub(r"//[^/@]*@", "//", url)


async def _read_capped(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > _MOST_ANSWER_BYTES:
            response.close()
            raise PayloadError(f"The answer has more than {_MOST_ANSWER_BYTES} bytes.")
    return bytes(content)


def _header_bytes(headers: Mapping[str, str]) -> int:
    """Bytes of headers on the wire, the empty line behind them counted."""
    return sum(len(name) + len(value) + 4 for name, value in headers.items()) + 2
