"""The link over a network: the V2 protocol over HTTP, tensors as bytes, on pooled connections."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

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

Array = npt.NDArray[Any]
Result = TypeVar("Result")

_ZSTD_LEVEL = 1
"""Higher ones take longer than what they save takes to send at 10 Mbit/s."""
_MOST_ANSWER_BYTES = 64 * 2**20
_HANDED_OVER_S = 0.05
"""Beyond a call's own time limit, for it to pass from one thread to the other."""


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
        model, version = part_name(name, split_after), identity(bundle)
        self._path = f"{url.rstrip('/')}/v2/models/{model}/versions/{version}"
        self._where = f"{model} of version {version} at {url}"
        # Logits hardly compress, and bytes are counted as they come.
        self._headers = {"Accept-Encoding": "identity"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._ssl = True if ca_file is None else ssl.create_default_context(cafile=ca_file)
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="offramp-link", daemon=True
        )
        self._thread.start()

    def send(
        self, inputs: Mapping[str, Array], *, timeout_s: float, compresses: bool = False
    ) -> Reply:
        """See :meth:`offramp.offload.link.Link.send`."""
        # The server need not answer what nobody waits for any more.
        body, header_length = write_request(inputs, {"deadline_ms": 1e3 * timeout_s})
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(header_length),
        }
        if compresses:
            body = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(body)
            headers["Content-Encoding"] = "zstd"
        return self._within(timeout_s, self._infer(body, headers))

    def check(self, *, timeout_s: float) -> None:
        """See :meth:`offramp.offload.link.Link.check`."""
        self._within(timeout_s, self._ready())

    def close(self) -> None:
        """Close the connections."""
        if self._loop.is_closed():
            return
        if self._session is not None:
            asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _within(self, timeout_s: float, call: Coroutine[Any, Any, Result]) -> Result:
        """Run a call on the link's own thread, and say in our words what went wrong."""
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(call, timeout_s), self._loop)
        try:
            return future.result(timeout_s + _HANDED_OVER_S)
        except OfframpError:
            raise
        except TimeoutError as error:
            future.cancel()
            raise LinkTimeoutError(
                f"Expected an answer of {self._where} within {1e3 * timeout_s:.0f} ms. Got none."
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise OffloadError(f"Cannot reach {self._where}: {reason(error)}") from error

    async def _infer(self, body: bytes, headers: Mapping[str, str]) -> Reply:
        session = self._open_session()
        async with session.post(f"{self._path}/infer", data=body, headers=headers) as response:
            content = await _read_capped(response)
            self._check_status(response.status, content)
            outputs = read_answer(
                content,
                response.headers.get("Inference-Header-Content-Length"),
                max_bytes=_MOST_ANSWER_BYTES,
            )
            request = response.request_info
            line = f"{request.method} {request.url.raw_path} HTTP/1.1\r\n"
            return Reply(
                outputs=outputs,
                sent_bytes=len(line) + _header_bytes(request.headers) + len(body),
                received_bytes=len(f"HTTP/1.1 {response.status} {response.reason}\r\n")
                + _header_bytes(response.headers)
                + len(content),
            )

    async def _ready(self) -> None:
        async with self._open_session().get(f"{self._path}/ready") as response:
            self._check_status(response.status, await _read_capped(response))

    def _open_session(self) -> aiohttp.ClientSession:
        """The pool of connections, which belongs to the link's thread."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._ssl),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._session

    def _check_status(self, status: int, content: bytes) -> None:
        if status == 200:
            return
        said = content[:200].decode(errors="replace")
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
