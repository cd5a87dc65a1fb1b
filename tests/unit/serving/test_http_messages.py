import json

import numpy as np
import pytest

from offramp.errors import PayloadError
from offramp.serving.http_client import read_answer
from offramp.serving.http_messages import read_request

X = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [0.5, 1.0]}
BYTES = {"name": "x", "shape": [1, 2], "datatype": "FP32"}
MOST = 2**20


def read(request, tail=b""):
    body = json.dumps(request).encode()
    return read_request(body + tail, str(len(body)) if tail else None, MOST)


@pytest.mark.parametrize(
    "request_",
    [
        {"inputs": [X]},
        {"inputs": [X], "id": None, "outputs": None, "parameters": None},
        {"inputs": [{**X, "parameters": None}]},
        {"inputs": [{**X, "parameters": {}}], "outputs": [], "parameters": {}},
        {"inputs": [{**X, "parameters": {"binary_data_size": None}}]},
        {"inputs": [{**X, "parameters": {"shared_memory_region": None}}]},
        {"inputs": [X], "parameters": {"binary_data_output": None, "deadline_ms": None}},
        {"inputs": [X], "a member of another version": None, "another": [1]},
    ],
)
def test_optional_member_that_is_null_or_empty_counts_as_absent(request_):
    found = read(request_)
    assert (found.id, found.parameters, found.wanted) == (None, {}, ())
    assert found.is_binary is False
    np.testing.assert_array_equal(found.inputs["x"], np.array([[0.5, 1]], np.float32))


def test_null_parameters_of_an_output_leave_the_choice_to_the_request():
    outputs = [
        {"name": "a", "parameters": None},
        {"name": "b", "parameters": {"binary_data": None}},
        {"name": "c", "parameters": {"binary_data": False}},
    ]
    found = read({"inputs": [X], "outputs": outputs, "parameters": {"binary_data_output": True}})
    assert found.binary == {"a": True, "b": True, "c": False}


def test_null_data_beside_binary_data_counts_as_absent():
    tensor = {**BYTES, "data": None, "parameters": {"binary_data_size": 8}}
    found = read({"inputs": [tensor]}, np.array([0.5, 1], "<f4").tobytes())
    np.testing.assert_array_equal(found.inputs["x"], np.array([[0.5, 1]], np.float32))


def test_answer_with_null_members_is_read():
    answer = {"id": None, "parameters": None, "outputs": [{**X, "parameters": None}]}
    found = read_answer(json.dumps(answer).encode(), None, max_bytes=MOST)
    np.testing.assert_array_equal(found["x"], np.array([[0.5, 1]], np.float32))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"inputs": [{**X, "name": None}]}, "The 'name' of a tensor must be a string. Got None"),
        ({"inputs": [{**X, "datatype": None}]}, "datatype of tensor 'x' must be one of"),
        ({"inputs": [{**X, "shape": None}]}, "shape of tensor 'x' must be"),
        ({"inputs": [{**X, "data": None}]}, "data of tensor 'x' must be a list. Got NoneType"),
        ({"inputs": [None]}, "'inputs' must be a list of JSON objects"),
        ({"inputs": [X], "outputs": [None]}, "'outputs' must be a list of JSON objects"),
        ({"inputs": [{**X, "data": ["0.5", "1"]}]}, "must be of type float32. Got one of type str"),
        ({"inputs": [{**X, "data": [None, 1]}]}, "Got one of type NoneType"),
        ({"inputs": [{**X, "shape": ["1", "2"]}]}, "must be at most 16 whole numbers"),
        ({"inputs": [{**X, "parameters": {"binary_data_size": "8"}}]}, "must be a number of bytes"),
        ({"inputs": [X], "parameters": []}, "'parameters' must be a JSON object"),
        ({"inputs": [X], "parameters": {"a": {"b": None}}}, "of booleans, numbers and strings"),
        ({"inputs": [X], "parameters": {"binary_data_output": "true"}}, "must be true or false"),
        ({"inputs": [X], "id": 7}, "The 'id' of a request must be a string. Got 7"),
    ],
)
def test_what_is_required_or_of_another_kind_is_refused(request_, words):
    with pytest.raises(PayloadError, match=words):
        read(request_)
