"""A link as bad as a real one, for tests and trials: a proxy that delays, paces, stalls, cuts."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from offramp.errors import InvalidArgumentError

_CHUNK_BYTES = 1448
"""Bytes that a TCP packet holds on an Ethernet."""
_BUFFER_S = 0.1
_TIMER_S = 1.5e-3
"""An event loop's timers are late by up to a millisecond: the rest is waited for by asking."""


@dataclass(frozen=True, kw_only=True)
class LinkShape:
    """Conditions of a link; both directions alike.

    Attributes:
        mbit: Megabits a second, each way; as fast as it goes unless told.
        rtt_ms: Milliseconds there and back, for the first byte.
        drop: Share of packets that are lost, and come again.
        stall_ms: Milliseconds until a lost packet is sent again.
    """

    mbit: float | None = None
    rtt_ms: float = 0.0
    drop: float = 0.0
    stall_ms: float = 200.0

    def __post_init__(self) -> None:
        valid = {
            "mbit": (self.mbit is None or self.mbit > 0, "a number above 0"),
            "rtt_ms": (self.rtt_ms >= 0, "a number of at least 0"),
            "drop": (0 <= self.drop < 1, "a share in [0, 1)"),
            "stall_ms": (self.stall_ms >= 0, "a number of at least 0"),
        }
        for name, (is_valid, expected) in valid.items():
            if not is_valid:
                raise InvalidArgumentError(
                    f"The {name!r} parameter must be {expected}. Got {getattr(self, name)!r}."
                )


class LinkProxy:
    """Listens on a port and passes bytes on to another, as a link of some shape would.

    A lost packet holds up those behind it, as in TCP. Used as an asynchronous context manager; on
    leaving it, all connections are closed.
    """

    def __init__(
        self,
        host: str,
        port: int,
        shape: LinkShape,
        *,
        listen_host: str = "127.0.0.1",
        listen_port: int = 0,
        seed: int = 0,
    ) -> None:
        self.shape = shape
        self.port = listen_port
        self.carried_bytes = 0
        self._to = (host, port)
        self._listen_host = listen_host
        self._random = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> LinkProxy:
        await self.restore()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()

    async def cut(self) -> None:
        """Close all connections and take no new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def restore(self) -> None:
        """Take connections, on the same port as before."""
        if self._server is None:
            self._server = await asyncio.start_server(self._connect, self._listen_host, self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # a server calls this in one
        self._connections.add(task)
        ways: list[asyncio.Task[None]] = []
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._to)
            writers.append(far_writer)
            pairs = ((reader, far_writer), (far_reader, writer))
            ways = [asyncio.create_task(self._carry(*pair)) for pair in pairs]
            await asyncio.gather(*ways)
        except (OSError, asyncio.CancelledError):
            pass  # an end hung up, or the link was cut
        finally:
            for way in ways:
                way.cancel()
            for each in writers:
                each.transport.abort()
            self._connections.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one direction on: packets leave at the link's pace and arrive half an RTT later."""
        packets: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        deliver = asyncio.create_task(_deliver(packets, writer))
        clock = asyncio.get_running_loop().time
        free_at = 0.0
        try:
            while packet := await reader.read(_CHUNK_BYTES):
                self.carried_bytes += len(packet)
                free_at = max(free_at, clock()) + self._sending_s(len(packet))
                packets.put_nowait((free_at + self.shape.rtt_ms / 2e3, packet))
                # The link is as far ahead as its buffer is large; then the sender has to wait.
                if free_at - clock() > _BUFFER_S:
                    await asyncio.sleep(free_at - clock() - _BUFFER_S)
            packets.put_nowait((free_at + self.shape.rtt_ms / 2e3, b""))
            await deliver
        finally:
            deliver.cancel()

    def _sending_s(self, num_bytes: int) -> float:
        shape = self.shape
        stall_s = shape.stall_ms / 1e3 if self._random.random() < shape.drop else 0.0
        return stall_s + (0.0 if shape.mbit is None else num_bytes * 8 / (1e6 * shape.mbit))


async def _deliver(
    packets: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        arrives_at, packet = await packets.get()
        if arrives_at - clock() > _TIMER_S:
            await asyncio.sleep(arrives_at - clock() - _TIMER_S)
        while clock() < arrives_at:
            await asyncio.sleep(0)
        if not packet:
            writer.write_eof()
            return
        writer.write(packet)
        await writer.drain()
