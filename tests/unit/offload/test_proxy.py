import asyncio
import contextlib
import time

import pytest

from offramp.errors import InvalidArgumentError
from offramp.offload.proxy import LinkProxy, LinkShape


async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def round_trip(port, payload):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started = time.perf_counter()
    writer.write(payload)
    back = await reader.readexactly(len(payload))
    took_s = time.perf_counter() - started
    writer.close()
    return back, took_s


def through(shape, payload, **options):
    """What comes back of a payload, and after how many seconds."""

    async def run():
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with LinkProxy("127.0.0.1", port, shape, **options) as proxy:
            result = await round_trip(proxy.port, payload)
            carried = proxy.carried_bytes
        server.close()
        return *result, carried

    return asyncio.run(run())


def test_every_byte_arrives_in_order_and_is_counted():
    payload = bytes(range(256)) * 400
    back, _, carried = through(LinkShape(), payload)
    assert back == payload
    assert carried == 2 * len(payload)


def test_a_byte_takes_a_round_trip():
    _, took_s, _ = through(LinkShape(rtt_ms=40), b"x")
    assert took_s >= 0.04


def test_many_bytes_go_at_the_pace_of_the_link():
    # 100 kB at 8 Mbit/s are 0.1 s; the way back overlaps with the way there.
    _, took_s, _ = through(LinkShape(mbit=8), bytes(100_000))
    assert took_s >= 0.1


def test_lost_packets_come_again():
    payload = bytes(20_000)
    back, took_s, _ = through(LinkShape(drop=0.3, stall_ms=20), payload)
    assert back == payload
    assert took_s >= 0.02


def test_a_cut_link_refuses_and_comes_back_on_its_port():
    async def run():
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with LinkProxy("127.0.0.1", port, LinkShape()) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"a")
            assert await reader.read(1) == b"a"
            await proxy.cut()
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read(1) == b""
            with pytest.raises(OSError):  # noqa: PT011
                await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.close()
            await proxy.restore()
            assert (await round_trip(proxy.port, b"c"))[0] == b"c"
        server.close()

    asyncio.run(run())


def test_a_far_end_that_is_gone_hangs_up():
    async def run():
        async with LinkProxy("127.0.0.1", 1, LinkShape()) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "wrong", [{"mbit": 0}, {"rtt_ms": -1}, {"drop": 1.0}, {"drop": -0.1}, {"stall_ms": -1}]
)
def test_senseless_links_are_refused(wrong):
    with pytest.raises(InvalidArgumentError, match="parameter must be"):
        LinkShape(**wrong)
