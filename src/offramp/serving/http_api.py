"""The protocol over HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from offramp.errors import LinkTimeoutError, OfframpError, PayloadError
from offramp.serving.encodings import accepted_encoding, decompress
from offramp.serving.http_messages import read_request, write_answer
from offramp.serving.metrics import CONTENT_TYPE
from offramp.serving.refusals import FAILED, PayloadTooLargeError, outcome_of, words_of
from offramp.serving.service import Service

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The header that says how much of a body is JSON, where tensors follow as bytes."""
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
"""Paths that need no token: whoever watches over processes has none."""
_LONGEST_READ_S = 60
_LEAST_COMPRESSED = 1024
"""Bytes of an answer below which compressing it gains nothing."""

_log = logging.getLogger(__name__)


def make_app(service: Service, max_payload_bytes: int) -> web.Application:
    """Put the routes together."""
    routes = _Routes(service, max_payload_bytes)
    app = web.Application(middlewares=[_guard(service)])
    app.router.add_get("/v2/health/live", routes.live)
    app.router.add_get("/v2/health/ready", routes.ready)
    app.router.add_get("/v2", routes.server_metadata)
    app.router.add_get("/metrics", routes.metrics)
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.router.add_get(model, routes.model_metadata)
        app.router.add_get(f"{model}/ready", routes.model_ready)
        app.router.add_get(f"{model}/config", routes.model_config)
        app.router.add_post(f"{model}/infer", routes.infer)
    return app


def _guard(service: Service) -> Middleware:
    """Stands before every route: checks the token, and puts errors in the protocol's words."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.path not in OPEN_PATHS:
                service.authenticate(request.headers.get("Authorization"))
            response = await handler(request)
        except web.HTTPException as error:  # no such route, or another method
            words = f"{error.reason}: {request.method} {request.path[:80]}"
            response = _refusal(error.status, words)
        except Exception as error:
            outcome = outcome_of(error)
            if outcome is FAILED:
                _log.error("%s failed", request.path[:200], exc_info=error)
            response = _refusal(outcome.http_status, words_of(error))
        if not service.is_ready:  # the client shall not send another request into a closing socket
            response.force_close()
        return response

    return guard


def _refusal(status: int, words: str) -> web.Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status)
    return web.json_response({"error": words}, status=status, headers=headers)


class _Routes:
    """One method a route."""

    def __init__(self, service: Service, max_payload_bytes: int) -> None:
        self._service, self._max_payload_bytes = service, max_payload_bytes

    async def live(self, _: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def ready(self, _: web.Request) -> web.Response:
        return self._readiness()

    async def model_ready(self, request: web.Request) -> web.Response:
        self._service.model(*_named(request))
        return self._readiness()

    def _readiness(self) -> web.Response:
        is_ready = self._service.is_ready
        # The protocol wants a 4xx here for no.
        return web.json_response({"ready": is_ready}, status=200 if is_ready else 400)

    async def server_metadata(self, _: web.Request) -> web.Response:
        return web.json_response(self._service.server_metadata())

    async def model_metadata(self, request: web.Request) -> web.Response:
        model = self._service.model(*_named(request))
        return web.json_response(self._service.model_metadata(model))

    async def model_config(self, request: web.Request) -> web.Response:
        model = self._service.model(*_named(request))
        return web.json_response(self._service.model_config(model))

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._service.metrics.text(), headers={"Content-Type": CONTENT_TYPE}
        )

    async def infer(self, request: web.Request) -> web.Response:
        name, version = _named(request)
        with self._service.counted(name), self._service.holding() as hold:
            model = self._service.model(name, version)
            asked = read_request(
                await _in_time(self._read(request, hold)),
                request.headers.get(HEADER_LENGTH),
                self._max_payload_bytes,
            )
            answers = await self._service.answer(
                model, asked.inputs, asked.parameters, asked.wanted
            )
            body, header_length = write_answer(asked, model, answers)
        return _response(request, body, header_length)

    async def _read(self, request: web.Request, hold: Callable[[int], None]) -> bytes:
        """The body, decompressed; ``hold`` is told of it as it comes."""
        parts, size = [], request.content_length or 0
        if size <= self._max_payload_bytes:
            size = 0
            async for part in request.content.iter_any():
                size += len(part)
                hold(len(part))
                if size > self._max_payload_bytes:
                    break
                parts.append(part)
        if size > self._max_payload_bytes:
            raise PayloadTooLargeError(
                f"The body may have at most {self._max_payload_bytes} bytes. It has more. "
                "Send fewer samples at once."
            )
        encoding = request.headers.get("Content-Encoding", "")
        body = decompress(encoding, b"".join(parts), self._max_payload_bytes)
        hold(max(0, len(body) - size))
        return body


async def _in_time(reading: Coroutine[Any, Any, bytes]) -> bytes:
    try:
        return await asyncio.wait_for(reading, _LONGEST_READ_S)
    except OfframpError:
        raise
    except asyncio.TimeoutError as error:
        raise LinkTimeoutError(
            f"The body of a request must come within {_LONGEST_READ_S} seconds. It did not."
        ) from error
    except (OSError, ClientPayloadError, web.RequestPayloadError, HttpProcessingError) as error:
        raise PayloadError(
            "The body of the request broke off, or its chunks are damaged."
        ) from error


def _named(request: web.Request) -> tuple[str, str]:
    return request.match_info["model"], request.match_info.get("version", "")


def _response(request: web.Request, body: bytes, header_length: int | None) -> web.Response:
    headers = {"Content-Type": "application/json"}
    if header_length is not None:
        headers = {
            "Content-Type": "application/octet-stream",
            HEADER_LENGTH: str(header_length),
        }
    response = web.Response(body=body, headers=headers)
    encoding = accepted_encoding(request.headers.get("Accept-Encoding", ""))
    if encoding is not None and len(body) >= _LEAST_COMPRESSED:
        response.enable_compression(web.ContentCoding(encoding))
    return response
