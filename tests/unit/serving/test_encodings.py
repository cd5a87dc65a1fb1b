import gzip
import tracemalloc
import zlib

import pytest
import zstandard

from offramp.errors import PayloadError
from offramp.serving.encodings import accepted_encoding, decompress
from offramp.serving.refusals import EncodingError, PayloadTooLargeError

COMPRESS = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("encoding", COMPRESS)
def test_there_and_back(encoding):
    body = bytes(range(256)) * 40
    assert decompress(encoding, COMPRESS[encoding](body), len(body)) == body
    assert decompress(f" {encoding.upper()} ", COMPRESS[encoding](body), len(body)) == body
    assert decompress(encoding, COMPRESS[encoding](b""), 10) == b""


def test_no_encoding():
    assert decompress("", b"abc", 3) == decompress("identity", b"abc", 3) == b"abc"


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "x" * 10**5])
def test_unknown_encoding(encoding):
    with pytest.raises(EncodingError, match="gzip, deflate or zstd") as refused:
        decompress(encoding, b"abc", 10)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("encoding", COMPRESS)
def test_bomb_takes_no_more_memory_than_the_cap(encoding):
    bomb, cap = COMPRESS[encoding](bytes(64 << 20)), 1 << 20
    tracemalloc.start()
    with pytest.raises(PayloadTooLargeError, match="at most 1048576 bytes"):
        decompress(encoding, bomb, cap)
    assert tracemalloc.get_traced_memory()[1] < 4 * cap
    tracemalloc.stop()


@pytest.mark.parametrize("encoding", COMPRESS)
@pytest.mark.parametrize("damage", [lambda b: b[10:], lambda b: b"\0" + b, lambda _: b"no"])
def test_damaged_body(encoding, damage):
    body = COMPRESS[encoding](bytes(range(256)) * 40)
    with pytest.raises(PayloadError, match=f"is no {encoding}|cut short"):
        decompress(encoding, damage(body), 10**6)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b + b"more", lambda _: b""])
def test_body_cut_short_or_followed_by_something(encoding, damage):
    with pytest.raises(PayloadError, match="cut short, or has something behind"):
        decompress(encoding, damage(COMPRESS[encoding](bytes(1000))), 10**6)


def test_zstd_frame_cut_short_gives_a_part():
    body = bytes(range(256)) * 4000
    assert len(decompress("zstd", COMPRESS["zstd"](body)[:-40], 10**7)) < len(body)


def test_zstd_window_beyond_what_the_web_allows():
    wide = zstandard.ZstdCompressionParameters(window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    body = stream.compress(bytes(100)) + stream.flush()
    with pytest.raises(PayloadError, match="is no zstd"):
        decompress("zstd", body, 10**6)


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("", None),
        ("br, zstd", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("br;q=1, DEFLATE;q=0.5, gzip;q=0", "deflate"),
        ("gzip; q=0.0", None),
        ("deflate, gzip", "gzip"),
    ],
)
def test_what_the_client_accepts(header, encoding):
    assert accepted_encoding(header) == encoding
