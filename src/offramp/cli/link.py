"""``offramp link``."""

from __future__ import annotations

import asyncio
import signal

from offramp.cli.server_options import Link
from offramp.errors import InvalidArgumentError
from offramp.offload.proxy import LinkProxy


def link(asked: Link) -> None:
    """Pass bytes on until a signal comes."""
    far_host, _, far_port = asked.to.rpartition(":")
    if not far_host or not far_port.isdigit():
        raise InvalidArgumentError(
            f"--to must be HOST:PORT, for example 127.0.0.1:8000. Got {asked.to!r}."
        )
    proxy = LinkProxy(
        far_host,
        int(far_port),
        asked.shape,
        listen_host=asked.host,
        listen_port=asked.port,
        seed=asked.seed,
    )
    asyncio.run(_carry(proxy, asked))


async def _carry(proxy: LinkProxy, asked: Link) -> None:
    """Pass bytes on until a signal comes, then say how many."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with proxy:
        print(f"a link from {asked.host}:{proxy.port} to {asked.to}", flush=True)
        await stopping.wait()
    print(f"{proxy.carried_bytes} bytes crossed it")
