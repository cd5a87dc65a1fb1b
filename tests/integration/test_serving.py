"""A served bundle, asked by tritonclient and by clients that do not keep to the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import select
import signal
import socket
import ssl
import subprocess
import threading
import time
import zlib

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
import zstandard
from served import INPUT, Gated, X, serve_in_thread, serve_process
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from offramp.runtime import Session, read_bundle
from offramp.serving import RunnerModel

OUTPUTS = ["output", "label", "exit_index", "confidence", "macs"]
INFER = "/v2/models/tiny/infer"
CAP = 1 << 20


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return tiny_bundle


@pytest.fixture(scope="module")
def addresses(bundle):
    """HTTP and gRPC of ``offramp serve``, in a process that cannot import torch."""
    with serve_process(bundle, "--max-payload-mb", "1") as (_, http_address, grpc_address):
        yield http_address, grpc_address


@pytest.fixture(scope="module")
def http_address(addresses):
    return addresses[0]


@pytest.fixture(scope="module")
def stub(addresses):
    with grpc.insecure_channel(addresses[1]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def expected(bundle):
    result = Session(bundle, threads=1).run(X)
    return {
        "output": result.output,
        "label": result.output.argmax(1),
        "exit_index": result.exit_index,
        "confidence": result.confidence,
        "macs": result.macs,
    }


def tensor(module, values, name=INPUT, datatype="FP32", **options):
    made = module.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, **options)
    return made


def ask(address, path, body=None, **headers):
    """One HTTP request of our own: status, headers, and the body read as JSON."""
    connection = http.client.HTTPConnection(address, timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, body, names)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, json.loads(content)


def request(**changes):
    """The JSON of a good request, with something changed."""
    entry = {"name": INPUT, "datatype": "FP32", "shape": [1, 6], "data": X[0].tolist()}
    return json.dumps({"inputs": [entry | changes]}).encode()


def message(**changes):
    """The gRPC message of a good request, with something changed."""
    made = service_pb2.ModelInferRequest(model_name="tiny")
    entry = {"name": INPUT, "datatype": "FP32", "shape": [1, 6]} | changes
    made.inputs.add(**entry)
    made.raw_input_contents.append(X[0].tobytes())
    return made


def assert_alive(address):
    status, _, answer = ask(address, INFER, request())
    assert status == 200
    assert [output["name"] for output in answer["outputs"]] == OUTPUTS


def assert_equal(result, expected, count):
    for name in OUTPUTS:
        found = result.as_numpy(name)
        np.testing.assert_allclose(found, expected[name][:count], atol=1e-5)
        assert found.dtype == expected[name].dtype


@pytest.mark.parametrize("module", [triton_http, triton_grpc], ids=["http", "grpc"])
def test_tritonclient_sees_server_and_model(module, addresses, bundle):
    address = addresses[module is triton_grpc]
    options = {"as_json": True} if module is triton_grpc else {}
    with module.InferenceServerClient(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert client.is_model_ready("tiny", "1")
        assert client.get_server_metadata(**options)["name"] == "offramp"
        metadata = client.get_model_metadata("tiny", **options)
        config = client.get_model_config("tiny", **options)
    assert (metadata["name"], metadata["versions"]) == ("tiny", ["1"])
    shapes = {entry["name"]: list(map(int, entry["shape"])) for entry in metadata["outputs"]}
    assert shapes == {"output": [-1, 4], **{name: [-1] for name in OUTPUTS[1:]}}
    config = config.get("config", config)
    assert [list(map(int, entry["dims"])) for entry in config["input"]] == [[6]]
    weights = config["parameters"]["weights_sha256"]["string_value"]
    assert weights == read_bundle(bundle).weights_sha256


@pytest.mark.parametrize("count", [1, 256])
@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient_http(http_address, expected, binary, compression, count):
    with triton_http.InferenceServerClient(http_address) as client:
        wanted = [triton_http.InferRequestedOutput(name, binary_data=binary) for name in OUTPUTS]
        result = client.infer(
            "tiny",
            [tensor(triton_http, X[:count], binary_data=binary)],
            outputs=wanted,
            request_id="mine",
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
    assert result.get_response()["id"] == "mine"
    assert_equal(result, expected, count)


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient_grpc(addresses, expected, compression):
    with triton_grpc.InferenceServerClient(addresses[1]) as client:
        result = client.infer(
            "tiny",
            [tensor(triton_grpc, X[:50])],
            model_version="1",
            request_id="mine",
            compression_algorithm=compression,
            client_timeout=30,
        )
    assert result.get_response().id == "mine"
    assert_equal(result, expected, 50)


@pytest.mark.parametrize("module", [triton_http_aio, triton_grpc_aio], ids=["http", "grpc"])
def test_tritonclient_aio_many_at_once(module, addresses, expected):
    async def ask_all():
        async with module.InferenceServerClient(addresses[module is triton_grpc_aio]) as client:
            assert await client.is_server_ready()
            await client.get_model_metadata("tiny")
            answers = [client.infer("tiny", [tensor(module, x[None])]) for x in X[:40]]
            return await asyncio.gather(*answers)

    found = asyncio.run(ask_all())
    for name in OUTPUTS:
        together = np.concatenate([result.as_numpy(name) for result in found])
        np.testing.assert_allclose(together, expected[name][:40], atol=1e-5)


def test_only_outputs_that_are_asked_for_in_their_order(http_address, stub):
    body = {**json.loads(request()), "outputs": [{"name": "label"}, {"name": "output"}]}
    _, _, answer = ask(http_address, INFER, json.dumps(body).encode())
    assert [output["name"] for output in answer["outputs"]] == ["label", "output"]
    made = message()
    made.outputs.add(name="macs")
    assert [output.name for output in stub.ModelInfer(made).outputs] == ["macs"]


def test_typed_contents(stub, expected):
    made = service_pb2.ModelInferRequest(model_name="tiny")
    made.inputs.add(name=INPUT, datatype="FP32", shape=[2, 6])
    made.inputs[0].contents.fp32_contents.extend(X[:2].ravel().tolist())
    answer = stub.ModelInfer(made)
    labels = np.frombuffer(answer.raw_output_contents[1], np.int64)
    assert labels.tolist() == expected["label"][:2].tolist()


def test_nested_lists_and_zstd(http_address, expected):
    body = zstandard.ZstdCompressor().compress(request(data=[X[0].tolist()]))
    _, _, answer = ask(http_address, INFER, body, Content_Encoding="zstd")
    assert answer["outputs"][1]["data"] == [expected["label"][0]]


WRONG_ENTRIES = {
    "name": ({"name": "x"}, "Expected the inputs features_0. Got x"),
    "no name": ({"name": None}, "'name' of a tensor must be a string"),
    "datatype": ({"datatype": "FP64"}, "must be of type float32. Got float64"),
    "bytes": ({"datatype": "BYTES"}, "must be one of BOOL"),
    "features": ({"shape": [1, 5], "data": [0.0] * 5}, "Expected inputs of shape (B, 6)"),
    "no samples": ({"shape": [0, 6], "data": []}, "B at least 1"),
    "no batch axis": ({"shape": [6]}, "Expected inputs of shape (B, 6)"),
    "negative": ({"shape": [-1, 6]}, "whole numbers of at least 0"),
    "huge": ({"shape": [2**40, 6]}, "larger than the 1048576 bytes"),
    "too few": ({"data": [0.0]}, "takes 6 elements. Got 1"),
    "text": ({"data": ["a"] * 6}, "Got one of type str"),
    "null": ({"data": [None] * 6}, "Got one of type NoneType"),
    "no data": ({"data": None}, "must be a list"),
    "too many samples": ({"shape": [257, 6], "data": [0.0] * 257 * 6}, "at most 256 samples"),
    "NaN": ({"data": [float("nan")] * 6}, "must be finite. Got NaN"),
    "infinity": ({"data": [float("inf")] * 6}, "must be finite. Got Infinity"),
    "shared memory": ({"parameters": {"shared_memory_region": "r"}}, "Shared memory is not"),
    "binary size": ({"parameters": {"binary_data_size": 24}}, "'binary_data_size' of tensor"),
}
WRONG_BODIES = {
    "empty": (b"", {}, "no JSON"),
    "no JSON": (b"\xff\xfe{", {}, "no JSON"),
    "a list": (b"[]", {}, "must be a JSON object. Got list"),
    "deep": (b"[" * 100_000, {}, "nested too deeply"),
    "a key twice": (b'{"id": "a", "id": "b"}', {}, "is there twice"),
    "many lists": (b"[" * 300_000, {}, "at most 250000 lists"),
    "long number": (b'{"id": ' + b"9" * 10_000 + b"}", {}, "no JSON"),
    "no inputs": (b"{}", {}, "Expected the inputs features_0. Got none"),
    "inputs": (b'{"inputs": [3]}', {}, "list of JSON objects"),
    "id": (b'{"id": 3}', {}, "'id' of a request must be a string"),
    "parameters": (b'{"parameters": {"a": []}}', {}, "booleans, numbers and strings"),
    "twice": (
        json.dumps({"inputs": json.loads(request())["inputs"] * 2}).encode(), {}, "there twice"
    ),
    "unknown output": (
        json.dumps({**json.loads(request()), "outputs": [{"name": "y"}]}).encode(), {}, "Got 'y'"
    ),
    "flag": (b'{"parameters": {"binary_data_output": 1}}', {}, "must be true or false"),
    "bytes behind": (request() + b"abc", {"Inference_Header_Content_Length": str(len(request()))},
                     "3 bytes follow"),
    "header length": (request(), {"Inference_Header_Content_Length": "99999"}, "bytes of JSON"),
    "header word": (request(), {"Inference_Header_Content_Length": "-1"}, "bytes of JSON"),
    "deadline": (
        json.dumps({**json.loads(request()), "parameters": {"deadline_ms": 0}}).encode(), {},
        "'deadline_ms' must be a number of milliseconds above 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ENTRIES)
def test_wrong_tensor_over_http(http_address, case):
    changes, words = WRONG_ENTRIES[case]
    status, _, answer = ask(http_address, INFER, request(**changes))
    assert status == 400
    assert words in answer["error"]
    assert_alive(http_address)


@pytest.mark.parametrize("case", WRONG_BODIES)
def test_wrong_body_over_http(http_address, case):
    body, headers, words = WRONG_BODIES[case]
    status, _, answer = ask(http_address, INFER, body, **headers)
    assert (status, words in answer["error"]) == (400, True), answer
    assert_alive(http_address)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v2/models/other", None, 404),
        ("/v2/models/other/infer", request(), 404),
        ("/v2/models/tiny/versions/2/infer", request(), 404),
        ("/v2/models/tiny/versions/2/ready", None, 404),
        ("/v2/nothing", None, 404),
        (INFER, None, 405),
    ],
)
def test_what_is_not_there_over_http(http_address, path, body, status):
    found, _, answer = ask(http_address, path, body)
    assert found == status
    assert answer["error"]
    assert_alive(http_address)


@pytest.mark.parametrize("case", ["plain", "chunked", "gzip", "deflate", "zstd"])
def test_too_much_over_http(http_address, case):
    compress = {
        "gzip": gzip.compress,
        "deflate": zlib.compress,
        "zstd": zstandard.ZstdCompressor().compress,
    }
    much = bytes(100 * CAP)
    headers = {} if case in ("plain", "chunked") else {"Content_Encoding": case}
    body = compress[case](much) if headers else much[: CAP + 1]
    sent = iter([body]) if case == "chunked" else body
    status, _, answer = ask(http_address, INFER, sent, **headers)
    assert status == 413
    assert "at most 1048576 bytes" in answer["error"]
    assert_alive(http_address)


def test_unknown_encoding_over_http(http_address):
    status, _, answer = ask(http_address, INFER, request(), Content_Encoding="br")
    assert (status, "gzip, deflate or zstd" in answer["error"]) == (415, True)
    assert_alive(http_address)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "x"}, "Expected the inputs features_0. Got x"),
        ({"datatype": "INT32"}, "must be of type float32. Got int32"),
        ({"datatype": "BF16"}, "must be one of BOOL"),
        ({"shape": [1, 7]}, "takes 28 bytes. Got 24"),
        ({"shape": [-1, -6]}, "whole numbers of at least 0"),
        ({"shape": [2**62, 2**62]}, "larger than the 1048576 bytes"),
    ],
)
def test_wrong_tensor_over_grpc(stub, changes, words):
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(message(**changes))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in refused.value.details()
    assert len(stub.ModelInfer(message()).outputs) == len(OUTPUTS)


def altered(change):
    made = message()
    change(made)
    return made


def with_raw(content):
    return altered(lambda m: m.raw_input_contents.__setitem__(0, content))


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (altered(lambda m: setattr(m, "model_name", "other")), "NOT_FOUND"),
        (altered(lambda m: setattr(m, "model_version", "2")), "NOT_FOUND"),
        (altered(lambda m: m.outputs.add(name="y")), "INVALID_ARGUMENT"),
        (altered(lambda m: m.raw_input_contents.append(b"")), "INVALID_ARGUMENT"),
        (altered(lambda m: m.ClearField("raw_input_contents")), "INVALID_ARGUMENT"),
        (altered(lambda m: m.inputs.append(m.inputs[0])), "INVALID_ARGUMENT"),
        (with_raw(np.full(6, np.nan, np.float32).tobytes()), "INVALID_ARGUMENT"),
        (with_raw(bytes(2 * CAP)), "RESOURCE_EXHAUSTED"),
        (
            altered(lambda m: setattr(m.parameters["deadline_ms"], "string_param", "soon")),
            "INVALID_ARGUMENT",
        ),
    ],
    ids=["name", "version", "output", "raw", "nothing", "twice", "NaN", "large", "deadline"],
)  # fmt: skip
def test_wrong_request_over_grpc(stub, made, code):
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(made)
    assert refused.value.code().name == code
    assert len(stub.ModelInfer(message()).outputs) == len(OUTPUTS)


def test_damaged_message_over_grpc(addresses, stub):
    with grpc.insecure_channel(addresses[1]) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"\xff" * 40)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "damaged" in refused.value.details()
    assert len(stub.ModelInfer(message()).outputs) == len(OUTPUTS)


@pytest.mark.parametrize("compression", ["Gzip", "Deflate"])
def test_bomb_over_grpc(stub, compression):
    bomb = with_raw(bytes(100 * CAP))
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(bomb, compression=getattr(grpc.Compression, compression))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(stub.ModelInfer(message()).outputs) == len(OUTPUTS)


def test_calls_that_are_not_served(stub):
    with pytest.raises(grpc.RpcError) as refused:
        stub.RepositoryIndex(service_pb2.RepositoryIndexRequest())
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_metrics_tell_how_requests_ended(bundle):
    model = RunnerModel(Session(bundle, threads=1), read_bundle(bundle), name="tiny")
    with serve_in_thread(model) as (address, _):
        body = request(shape=[40, 6], data=X[:40].ravel().tolist())
        assert ask(address, INFER, body)[0] == 200
        assert ask(address, INFER, b"{}")[0] == 400
        assert ask(address, "/v2/models/other/infer", body)[0] == 404
        connection = http.client.HTTPConnection(address, timeout=30)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
    lines = set(text.splitlines())
    assert 'offramp_requests_total{model="tiny",outcome="answered"} 1.0' in lines
    assert 'offramp_requests_total{model="tiny",outcome="invalid"} 1.0' in lines
    assert 'offramp_requests_total{model="",outcome="not_found"} 1.0' in lines
    assert 'offramp_rows_total{model="tiny"} 40.0' in lines
    assert 'offramp_queue_rows{model="tiny"} 0.0' in lines
    exits = Session(bundle, threads=1).run(X[:40]).exit_index
    for index in (0, 1):
        count = float((exits == index).sum())
        assert f'offramp_exits_total{{exit="{index}",model="tiny"}} {count}' in lines


def test_tokens(bundle, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("geheim\n")
    monkeypatch.setenv("OFFRAMP_TOKEN", "another")
    with serve_process(bundle, "--token-file", tmp_path / "token") as (_, address, grpc_address):
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert ask(address, path)[0] == 200
        for path in ("/v2", "/v2/models/tiny", "/v2/models/tiny/ready", "/metrics", "/nothing"):
            assert ask(address, path)[0] == 401
        for shown in ("Bearer another", "Bearer ", "geheim", "Basic geheim", "Bearer gehéim"):
            status, headers, answer = ask(
                address, INFER, request(), Authorization=shown.encode("latin-1")
            )
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert "authorization: Bearer TOKEN" in answer["error"]
        assert ask(address, INFER, request(), Authorization="bearer geheim")[0] == 200
        with triton_grpc.InferenceServerClient(grpc_address) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            for headers in (None, {"authorization": "Bearer another"}):
                with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                    client.infer("tiny", [tensor(triton_grpc, X[:1])], headers=headers)
            right = {"authorization": "Bearer geheim"}
            assert client.is_model_ready("tiny", headers=right)
            client.infer("tiny", [tensor(triton_grpc, X[:1])], headers=right)


@pytest.fixture
def gated():
    model = Gated()
    with serve_in_thread(model, max_queue_rows=1, max_payload_bytes=CAP) as (
        http_address,
        grpc_address,
    ):
        yield model, http_address, grpc_address
        model.gate.set()


def gated_request(value, **parameters):
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [value]}
    return json.dumps({"inputs": [entry], "parameters": parameters}).encode()


def gated_message(value):
    made = service_pb2.ModelInferRequest(model_name="gated")
    made.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    made.raw_input_contents.append(np.float32(value).tobytes())
    return made


def in_background(function, *arguments):
    """Start a call in a thread; what is returned waits for its result."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments)))
    thread.start()

    def result():
        thread.join(30)
        return found[0]

    return result


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def waiting_rows(address):
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return 'offramp_queue_rows{model="gated"} 1.0' in text.splitlines()


def test_a_busy_server_says_so_and_recovers(gated):
    model, address, grpc_address = gated
    path = "/v2/models/gated/infer"
    first = in_background(ask, address, path, gated_request(1.0))
    model.started.acquire()
    second = in_background(ask, address, path, gated_request(2.0))
    until(lambda: waiting_rows(address))
    status, headers, answer = ask(address, path, gated_request(3.0))
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "1 samples wait already, of 1" in answer["error"]
    with grpc.insecure_channel(grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(gated_message(3.0))
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        model.gate.set()
        assert (first()[0], second()[0]) == (200, 200)
        assert stub.ModelInfer(gated_message(3.0)).raw_output_contents == [b"\0\0\xc0\x40"]


def test_large_requests_that_wait_hold_a_bounded_memory(gated):
    model, address, _ = gated
    path = "/v2/models/gated/infer"
    first = in_background(ask, address, path, gated_request(1.0))
    model.started.acquire()
    host, port = address.split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {CAP}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(17):  # each all but its last bytes, and one more than may be held
            connections.append(stack.enter_context(socket.create_connection((host, int(port)))))
            with contextlib.suppress(OSError):
                connections[-1].sendall(head + b" " * (CAP - 10))
        answered, _, _ = select.select(connections, [], [], 20)
        assert answered[0].recv(12) == b"HTTP/1.1 503"
    until(lambda: ask(address, path, b" " * 1000)[0] == 400)
    model.gate.set()
    assert first()[0] == 200


def test_deadlines_over_both_protocols(gated):
    model, address, grpc_address = gated
    path = "/v2/models/gated/infer"
    first = in_background(ask, address, path, gated_request(1.0))
    model.started.acquire()
    status, _, answer = ask(address, path, gated_request(2.0, deadline_ms=20))
    assert (status, "deadline_ms of 20" in answer["error"]) == (504, True)
    with grpc.insecure_channel(grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        late = gated_message(3.0)
        late.parameters["deadline_ms"].double_param = 20.0
        for made, timeout in ((late, 30), (gated_message(4.0), 0.2)):
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(made, timeout=timeout)
            assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: not waiting_rows(address))  # the client's clock runs ahead of the server's
    model.gate.set()
    assert first()[0] == 200
    assert ask(address, path, gated_request(5.0))[0] == 200
    assert model.batches == [[1], [5]]


def test_clients_that_go_away_are_not_computed(gated):
    model, address, grpc_address = gated
    first = in_background(ask, address, "/v2/models/gated/infer", gated_request(1.0))
    model.started.acquire()
    host, port = address.split(":")
    body = gated_request(2.0)
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v2/models/gated/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        until(lambda: waiting_rows(address))
    until(lambda: not waiting_rows(address))
    with grpc.insecure_channel(grpc_address) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(
            gated_message(3.0)
        )
        until(lambda: waiting_rows(address))
        call.cancel()
        until(lambda: not waiting_rows(address))
    model.gate.set()
    assert first()[0] == 200
    assert ask(address, "/v2/models/gated/infer", gated_request(4.0))[0] == 200
    assert model.batches == [[1], [4]]


def test_a_model_that_fails_is_the_servers_fault_and_no_secret_of_its_gets_out(gated, caplog):
    model, address, _ = gated
    model.gate.set()
    status, _, answer = ask(address, "/v2/models/gated/infer", gated_request(-1.0))
    assert status == 500
    assert answer["error"] == "The model failed on this request; the server's log says why."
    assert "a negative number" in caplog.text
    assert ask(address, "/v2/models/gated/infer", gated_request(1.0))[0] == 200


def test_tls_over_both_protocols(bundle, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", key, "-out", cert),
        ],
        check=True,
        capture_output=True,
    )
    arguments = ("--host", "localhost", "--tls-cert", cert, "--tls-key", key)
    with serve_process(bundle, *arguments) as (_, http_address, grpc_address):
        context = ssl.create_default_context(cafile=cert)
        connection = http.client.HTTPSConnection(http_address, context=context, timeout=30)
        connection.request("POST", INFER, request())
        response = connection.getresponse()
        assert response.status == 200
        response.read()
        connection.close()
        with (
            triton_http.InferenceServerClient(
                http_address, ssl=True, ssl_context_factory=lambda: context
            ) as client,
            triton_grpc.InferenceServerClient(
                grpc_address, ssl=True, root_certificates=str(cert)
            ) as grpc_client,
        ):
            found = [
                asked.infer("tiny", [tensor(module, X[:3])]).as_numpy("label").tolist()
                for asked, module in ((client, triton_http), (grpc_client, triton_grpc))
            ]
        assert found[0] == found[1]
        with pytest.raises((http.client.HTTPException, OSError)):
            ask(http_address, INFER, request())
        with grpc.insecure_channel(grpc_address) as channel, pytest.raises(grpc.RpcError):
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message(), timeout=5)


def test_a_signal_under_load_loses_no_answer(bundle):
    """Every request is answered or refused in words, until the server closes the connection."""
    statuses: list[object] = []

    def ask_over_http(address):
        connection = http.client.HTTPConnection(address, timeout=30)
        is_open = True
        while is_open:
            try:
                connection.request("POST", INFER, request())
                response = connection.getresponse()
                statuses.append(response.status)
                is_open = not response.will_close
                response.read()
            except (http.client.HTTPException, OSError) as error:
                statuses.append(repr(error))
                is_open = False
        connection.close()

    def ask_over_grpc(address):
        with grpc.insecure_channel(address) as channel:
            ask_model = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer
            while True:
                try:
                    ask_model(message(), timeout=30)
                    statuses.append(grpc.StatusCode.OK)
                except grpc.RpcError as error:
                    statuses.append(error.code())
                    return

    with serve_process(bundle) as (process, *addresses):
        threads = [
            threading.Thread(target=work, args=(address,))
            for work, address in zip((ask_over_http, ask_over_grpc), addresses, strict=True)
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until(lambda: statuses.count(200) > 20 and statuses.count(grpc.StatusCode.OK) > 20)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    assert set(statuses) <= {200, 503, grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, statuses


def test_what_was_taken_before_the_signal_is_answered():
    model = Gated()
    found = []
    with serve_in_thread(model) as (address, grpc_address):
        path = "/v2/models/gated/infer"
        found.append(in_background(ask, address, path, gated_request(1.0)))
        model.started.acquire()
        found.append(in_background(ask, address, path, gated_request(2.0)))
        until(lambda: waiting_rows(address))
        channel = grpc.insecure_channel(grpc_address)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        last = stub.ModelInfer.future(gated_message(3.0))
        stub.ServerLive(service_pb2.ServerLiveRequest())
        threading.Timer(0.3, model.gate.set).start()
    assert [result()[0] for result in found] == [200, 200]
    assert last.result().raw_output_contents == [b"\0\0\xc0\x40"]
    channel.close()


def test_interrupt_ends_it_too(bundle):
    with serve_process(bundle) as (process, _, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
