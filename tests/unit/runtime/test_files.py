"""Weights that an ONNX file keeps elsewhere are found wherever a tensor may stand."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from offramp.runtime.files import has_weights_outside


def tensor(*, is_outside):
    made = numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    if is_outside:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        entry = made.external_data.add()
        entry.key, entry.value = "location", "w.bin"
    return made


def graph(nodes=(), **parts):
    return helper.make_graph(list(nodes), "g", [], [], **parts)


def sparse(field, weights):
    made = onnx.SparseTensorProto(dims=[8])
    getattr(made, field).CopyFrom(weights)
    return made


def node(**attributes):
    return helper.make_node("Any", [], ["y"], **attributes)


def in_function(weights):
    function = helper.make_function("d", "F", [], ["y"], [node(value=weights)], [])
    return helper.make_model(graph(), functions=[function])


def in_weights(weights):
    return helper.make_model(graph(initializer=[tensor(is_outside=False), weights]))


PLACES = {
    "an initializer": in_weights,
    "values of a sparse one": lambda w: helper.make_model(
        graph(sparse_initializer=[sparse("values", w)])
    ),
    "indices of a sparse one": lambda w: helper.make_model(
        graph(sparse_initializer=[sparse("indices", w)])
    ),
    "an attribute": lambda w: helper.make_model(graph([node(value=w)])),
    "an attribute of several": lambda w: helper.make_model(graph([node(values=[w, w])])),
    "a sparse attribute": lambda w: helper.make_model(graph([node(value=sparse("values", w))])),
    "a branch": lambda w: helper.make_model(graph([node(then=graph(initializer=[w]))])),
    "branches": lambda w: helper.make_model(graph([node(all=[graph(initializer=[w])])])),
    "a branch of a branch": lambda w: helper.make_model(
        graph([node(then=graph([node(then=graph([node(value=w)]))]))])
    ),
    "a function": in_function,
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_weights_outside_are_found(make):
    assert has_weights_outside(make(tensor(is_outside=True)).SerializeToString())
    assert not has_weights_outside(make(tensor(is_outside=False)).SerializeToString())


def test_a_field_that_protobuf_does_not_know_hides_nothing():
    group = b"\xa3\x06\x08\x01\xa4\x06"  # number 100, with a number in it
    content = in_weights(tensor(is_outside=True)).SerializeToString()
    assert onnx.load_from_string(group + content).graph.initializer[1].data_location == 1
    assert has_weights_outside(group + content)


def test_a_tensor_that_says_so_in_more_bytes_than_needed():
    # Graph, initializer, data_location: 1 in five bytes, with bits that protobuf drops.
    where = b"\x70\x81\x80\x80\x80\x10"
    content = b"\x3a" + bytes([len(where) + 2]) + b"\x2a" + bytes([len(where)]) + where
    assert onnx.load_from_string(content).graph.initializer[0].data_location == 1
    assert has_weights_outside(content)


@given(st.binary(max_size=200))
def test_any_bytes_have_an_answer(content):
    assert has_weights_outside(content) in (True, False)


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\xff" * 50, b"\x3a\xff\xff\xff\xff\x0f"])
def test_what_is_no_onnx_keeps_nothing_anywhere(content):
    assert not has_weights_outside(content)
