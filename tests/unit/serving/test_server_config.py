from pathlib import Path

import pytest

from offramp.errors import InvalidArgumentError
from offramp.serving.server import Server, ServerConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"http_port": -1}, r"'http_port' must be in \[0, 65535\]. Got -1"),
        ({"grpc_port": 65536}, "'grpc_port' must be in"),
        ({"max_payload_bytes": 0}, "'max_payload_bytes' must be an int of at least 1. Got 0"),
        ({"max_batch_rows": 0}, "'max_batch_rows'"),
        ({"max_queue_rows": 0}, "'max_queue_rows'"),
        ({"max_delay_ms": -1.0}, "'max_delay_ms' must be a number from 0"),
        ({"grace_s": float("nan")}, "'grace_s' must be a number from 0"),
        ({"token": ""}, "'token' must be one word of visible ASCII"),
        ({"token": "two words"}, "'token' must be one word"),
        ({"tls_cert": Path("cert.pem")}, "both 'tls_cert' and 'tls_key'"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(InvalidArgumentError, match=words):
        ServerConfig(**settings)


def test_a_token_is_never_in_a_message():
    with pytest.raises(InvalidArgumentError) as refused:
        ServerConfig(token="geheim nis")
    assert "geheim" not in str(refused.value)
    assert "geheim" not in repr(ServerConfig(token="geheim"))


@pytest.mark.parametrize(
    ("host", "token", "is_open"),
    [
        ("127.0.0.1", None, False),
        ("127.8.8.8", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("server.example", None, True),
        ("0.0.0.0", "secret", False),
    ],
)
def test_who_may_ask_without_a_token(host, token, is_open):
    assert ServerConfig(host=host, token=token).is_open_to_others == is_open


def test_certificates_are_read_before_anything_starts(tmp_path):
    (tmp_path / "cert.pem").write_text("no certificate")
    config = ServerConfig(tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "none.pem")
    with pytest.raises(InvalidArgumentError, match=r"certificate and its key as PEM .*cert\.pem"):
        Server([], config)
