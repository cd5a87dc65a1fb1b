"""Damaged requests by the thousand: the server lives on, answers the next, and does not grow."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import re
import selectors
import socket
import time
from collections import Counter

import grpc
import pytest
from served import INPUT, X, serve_process
from tritonclient.grpc import service_pb2

WARM_UP = 200
ROUND = 50
QUIET_S = 0.15
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NUMBERS = (
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"1.5",
    b"4294967296",
    b"18446744073709551616",
    b"9" * 400,
)
WORDS = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"\r\n", b"\0", b"\xff\xfe")


def http_requests():
    entry = {"name": INPUT, "datatype": "FP32", "shape": [2, 6]}
    as_json = json.dumps({"id": "a", "inputs": [entry | {"data": X[:2].ravel().tolist()}]}).encode()
    sized = entry | {"parameters": {"binary_data_size": 48}}
    head = {"inputs": [sized], "outputs": [{"name": "label", "parameters": {"binary_data": True}}]}
    head |= {"parameters": {"deadline_ms": 5000, "binary_data_output": True}}
    as_text = json.dumps(head).encode()
    binary = as_text + X[:2].tobytes()
    length = f"Inference-Header-Content-Length: {len(as_text)}\r\n"
    yield from (
        post(as_json, ""),
        post(binary, length),
        post(gzip.compress(binary), f"Content-Encoding: gzip\r\n{length}"),
        post(b"%x\r\n%s\r\n0\r\n\r\n" % (len(as_json), as_json), "Transfer-Encoding: chunked\r\n"),
        b"GET /v2/models/tiny/versions/1/config HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )


def post(body, headers):
    length = "" if "chunked" in headers else f"Content-Length: {len(body)}\r\n"
    head = "POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    return f"{head}{length}{headers}\r\n".encode() + body


def grpc_messages():
    made = service_pb2.ModelInferRequest(model_name="tiny", model_version="1", id="a")
    made.inputs.add(name=INPUT, datatype="FP32", shape=[2, 6])
    typed = service_pb2.ModelInferRequest()
    typed.CopyFrom(made)
    made.raw_input_contents.append(X[:2].tobytes())
    made.parameters["deadline_ms"].double_param = 5000.0
    made.outputs.add(name="label")
    typed.inputs[0].contents.fp32_contents.extend(X[:2].ravel().tolist())
    yield from (made.SerializeToString(), typed.SerializeToString())


def damaged(content, chance):
    """One to four changes: bits, numbers, words, pieces cut out, doubled or cut off."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        end = min(len(content), at + chance.choice((1, 1, 2, 8, 60)))
        kind = chance.randrange(7)
        if kind == 0:
            content = content[:at] + bytes(chance.randbytes(end - at)) + content[end:]
        elif kind == 1:
            content = content[:at] + content[end:]
        elif kind == 2:
            content = content[:at] + content[at:end] * chance.choice((2, 50)) + content[end:]
        elif kind == 3:
            content = content[:at]
        elif kind == 4:
            content = content[:at] + chance.choice(WORDS) + content[at:]
        else:
            found = list(re.finditer(rb"-?\d+(\.\d+)?", content))
            if found:
                number = chance.choice(found)
                content = (
                    content[: number.start()] + chance.choice(NUMBERS) + content[number.end() :]
                )
    return content


def exchange(address, contents, quiet_s=QUIET_S):
    """Send each on a connection of its own; what comes back, in order.

    Sending ends once all is quiet for so long: the server then sees that a request stays cut short.
    """
    host, port = address.split(":")
    answers = [b""] * len(contents)
    with selectors.DefaultSelector() as waiting:
        for index, content in enumerate(contents):
            connection = socket.create_connection((host, int(port)), timeout=20)
            waiting.register(connection, selectors.EVENT_READ, index)
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                connection.sendall(content)
        end = time.monotonic() + 20
        while waiting.get_map():
            assert time.monotonic() < end, "a connection hangs"
            ready = waiting.select(quiet_s)
            for key, _ in ready:
                answers[key.data] += (piece := receive(key.fileobj))
                if not piece:
                    waiting.unregister(key.fileobj).fileobj.close()
            if not ready:
                for key in waiting.get_map().values():
                    with contextlib.suppress(OSError):  # shut already
                        key.fileobj.shutdown(socket.SHUT_WR)
    return answers


def receive(connection):
    try:
        return connection.recv(65536)
    except (ConnectionResetError, BrokenPipeError):
        return b""


def ask_http(address, contents, quiet_s=QUIET_S):
    """The status of each answer; 0 if the connection closes without a word."""
    statuses = []
    for answer in exchange(address, contents, quiet_s):
        found = re.match(rb"HTTP/\d\.\d (\d{3}) ", answer)
        assert found or not answer, answer
        statuses.append(int(found[1]) if found else 0)
    return statuses


def ask_grpc(call, content):
    try:
        call(content, timeout=20)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def resident_mib(process):
    with open(f"/proc/{process.pid}/status", encoding="ascii") as status:
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1]) / 1024


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_requests(tiny_bundle, count):
    chance = random.Random(0)
    requests, messages = list(http_requests()), list(grpc_messages())
    with (
        serve_process(tiny_bundle, "--max-payload-mb", "1") as (process, address, grpc_address),
        grpc.insecure_channel(grpc_address) as channel,
    ):
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        def ask_damaged(rounds):
            outcomes = Counter()
            for _ in range(rounds):
                picked = [damaged(chance.choice(requests), chance) for _ in range(ROUND // 2)]
                outcomes.update(ask_http(address, picked))
                picked = [damaged(chance.choice(messages), chance) for _ in range(ROUND // 2)]
                outcomes.update(ask_grpc(call, content) for content in picked)
                exchange(grpc_address, [PREFACE + chance.randbytes(100)])  # hardly HTTP/2
                assert ask_http(address, requests, quiet_s=20) == [200] * len(requests)
                assert [ask_grpc(call, message) for message in messages] == ["OK", "OK"]
            return outcomes

        ask_damaged(WARM_UP // ROUND)
        before = resident_mib(process)
        outcomes = ask_damaged(count // ROUND)
        after = resident_mib(process)
        assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    print(f"{count} damaged requests: {dict(outcomes)}; {before:.1f} -> {after:.1f} MiB")
    refused = count - outcomes[200] - outcomes["OK"]
    assert refused > 0.6 * count
    assert not {500, "INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED"} & set(outcomes)
    assert after < 1.1 * before
