"""What ``offramp serve`` says when it cannot serve."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from served import serve_process


@pytest.fixture
def bundle(workplace, tiny_bundle):
    return Path(shutil.copytree(tiny_bundle, workplace / "run" / "bundle"))


def test_run_without_a_bundle(workplace, refuses):
    (workplace / "empty").mkdir()
    refuses("serve", "empty", words=("Expected a bundle", "offramp export empty"))


@pytest.mark.parametrize("option", ["--http-port", "--grpc-port"])
def test_port_in_use(bundle, refuses, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"--http-port": 0, "--grpc-port": 0} | {option: port}
        arguments = [str(word) for pair in ports.items() for word in pair]
        words = (f"Cannot listen on port {port} of 127.0.0.1", f"{option} N")
        refuses("serve", "run", *arguments, words=words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--name a/b", ("letters, digits", "'a/b'")),
        ("--http-port 70000", ("'http_port'", "70000")),
        ("--max-payload-mb 0", ("'max_payload_bytes'", "at least 1")),
        ("--threads 0", ("'threads'", "at least 1")),
        ("--token-file none.txt", ("none.txt", "No such file")),
        ("--tls-cert none.pem", ("'tls_cert' and 'tls_key'",)),
        ("--tls-cert none.pem --tls-key none.pem", ("PEM files", "none.pem")),
    ],
)
def test_wrong_options(bundle, refuses, arguments, words):
    refuses("serve", "run", *arguments.split(), words=words)


def test_other_machines_without_a_token_are_warned_of(bundle):
    with serve_process(bundle.parent, "--host", "0.0.0.0") as (process, _, _):
        process.terminate()
        _, stderr = process.communicate(timeout=30)
    assert stderr.startswith("offramp: warning: 0.0.0.0 is open to other machines and no token")
    assert stderr.count("\n") == 1


def test_without_grpc(bundle):
    code = (
        "import sys; sys.argv = ['offramp', 'serve', 'run/bundle', '--http-port', '0', "
        "'--grpc-port', '-1']\nfrom offramp.cli import main; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as served:
        line = served.stdout.readline()
        served.terminate()
        assert served.wait(30) == 0
    assert line.startswith("serving run at http://127.0.0.1:")
    assert "grpc" not in line


@pytest.mark.parametrize("missing", ["aiohttp", "tritonclient"])
def test_missing_extra_names_the_command(missing):
    outcome = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.modules[{missing!r}] = None\n"
            "sys.argv = ['offramp', 'serve', 'run']\nfrom offramp.cli import main; main()",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert f"offramp serve needs {missing}" in outcome.stderr
    assert "pip install 'offramp[serve]'" in outcome.stderr
