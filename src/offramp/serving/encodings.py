"""Bodies that are compressed: never more memory than the cap, whatever they claim to be."""

from __future__ import annotations

import zlib

import zstandard

from offramp.errors import PayloadError
from offramp.serving.refusals import EncodingError, PayloadTooLargeError

_ZLIB_WINDOW = {"gzip": 31, "deflate": 15}
"""The ``wbits`` that tell zlib the format; HTTP's deflate is what RFC 1950 calls zlib."""
_ZSTD_MOST_WINDOW = 1 << 23
"""Bytes of history that a zstd frame may ask for: 8 MiB, what RFC 9659 allows on the web."""


def decompress(encoding: str, body: bytes, max_bytes: int) -> bytes:
    """Undo a ``Content-Encoding``."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in (*_ZLIB_WINDOW, "zstd"):
        raise EncodingError(
            f"Content-Encoding must be gzip, deflate or zstd. Got {encoding[:80]!r}."
        )
    try:
        content = (
            _unzstd(body, max_bytes)
            if encoding == "zstd"
            else _inflate(body, _ZLIB_WINDOW[encoding], max_bytes)
        )
    except (zlib.error, zstandard.ZstdError) as error:
        raise PayloadError(f"The body is no {encoding}: {error}.") from error
    if len(content) > max_bytes:
        raise PayloadTooLargeError(
            f"The body may have at most {max_bytes} bytes. It has more, once decompressed. "
            "Send fewer samples at once."
        )
    return content


def _inflate(body: bytes, window: int, max_bytes: int) -> bytes:
    stream = zlib.decompressobj(window)
    content = stream.decompress(body, max_bytes + 1)
    if len(content) <= max_bytes and (not stream.eof or stream.unused_data):
        raise PayloadError("The compressed body is cut short, or has something behind it.")
    return content


def _unzstd(body: bytes, max_bytes: int) -> bytes:
    # A frame that is cut short ends early without a word; what it was to hold is then missed.
    frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MOST_WINDOW)
    parts, size = [], 0
    for part in frame.read_to_iter(body, write_size=1 << 16):
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            break
    return b"".join(parts)


def accepted_encoding(header: str) -> str | None:
    """Choose how to compress an answer."""
    offers = {}
    for offer in header.lower().split(","):
        name, _, quality = offer.partition(";")
        offers[name.strip()] = quality.replace(" ", "")
    is_refused = {"q=0", "q=0.0", "q=0.00", "q=0.000"}
    return next((x for x in _ZLIB_WINDOW if x in offers and offers[x] not in is_refused), None)
