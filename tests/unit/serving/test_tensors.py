import json

import numpy as np
import pytest

from offramp.errors import PayloadError
from offramp.serving.tensors import (
    DATATYPES,
    checked_shape,
    datatype_of,
    dtype_of,
    from_bytes,
    from_values,
    to_bytes,
    to_values,
)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_goes_there_and_back(datatype):
    dtype = dtype_of("x", datatype)
    array = np.array([[0, 1, 1], [1, 0, 0]]).astype(dtype)
    for found in (
        from_bytes("x", to_bytes(array), (2, 3), dtype),
        from_values("x", json.loads(json.dumps(to_values("x", array))), (2, 3), dtype),
        from_values("x", array.tolist(), (2, 3), dtype),
    ):
        np.testing.assert_array_equal(found, array)
        assert found.dtype == dtype
    assert datatype_of(dtype) == datatype


def test_limits_of_whole_numbers_survive_json():
    for datatype in ("INT64", "UINT64", "INT8"):
        limits = np.iinfo(DATATYPES[datatype])
        values = [int(limits.min), int(limits.max)]
        assert from_values("x", values, (2,), DATATYPES[datatype]).tolist() == values


@pytest.mark.parametrize("datatype", ["BYTES", "BF16", "FP8", "", None, 3, ["FP32"]])
def test_datatypes_that_are_not_served(datatype):
    with pytest.raises(PayloadError, match=r"datatype of tensor 'x' must be one of BOOL, .*Got"):
        dtype_of("x", datatype)


def test_numpy_type_without_a_name():
    with pytest.raises(PayloadError, match="Got complex64"):
        datatype_of("complex64")


@pytest.mark.parametrize(
    "shape", [[-1], [1.0], [True], ["1"], "12", None, 3, {"0": 1}, [1] * 17, [2**63], [[1]]]
)
def test_what_is_no_shape(shape):
    with pytest.raises(PayloadError, match=r"whole numbers of at least 0\. Got"):
        checked_shape("x", shape, np.dtype("float32"), 1000)


@pytest.mark.parametrize("shape", [[251], [2**62, 2**62], [0, 2**62], [1, 1, 10**18]])
def test_shapes_beyond_the_cap_are_refused_unallocated(shape):
    with pytest.raises(PayloadError, match="larger than the 1000 bytes"):
        checked_shape("x", shape, np.dtype("float32"), 1000)


def test_shape_at_the_cap():
    assert checked_shape("x", [250], np.dtype("float32"), 1000) == (250,)
    assert checked_shape("x", [], np.dtype("float32"), 1000) == ()
    assert from_bytes("x", b"", (0, 3), np.dtype("float32")).shape == (0, 3)
    assert from_values("x", [], (0, 3), np.dtype("float32")).shape == (0, 3)


@pytest.mark.parametrize("length", [0, 7, 9])
def test_bytes_that_do_not_fit_the_shape(length):
    with pytest.raises(PayloadError, match=f"takes 8 bytes. Got {length}"):
        from_bytes("x", bytes(length), (2,), np.dtype("float32"))


def test_bool_of_another_byte():
    with pytest.raises(PayloadError, match="neither 0 nor 1"):
        from_bytes("x", b"\x02", (1,), np.dtype("bool"))


def test_array_from_bytes_is_aligned_and_its_own():
    body = b"x" + np.arange(4, dtype=np.float32).tobytes()
    array = from_bytes("x", memoryview(body)[1:], (4,), np.dtype("float32"))
    assert array.flags.aligned
    assert array.flags.writeable


@pytest.mark.parametrize(
    ("data", "datatype", "words"),
    [
        ([1, 2, 3], "FP32", "takes 4 elements. Got 3"),
        ([[1, 2], [3]], "FP32", "nested as its shape"),
        ([[1, 2, 3, 4]], "FP32", "nested as its shape"),
        ([[[1], [2]], [[3], [4]]], "FP32", "Got one of type list"),
        ([[1, 2], 3], "FP32", "nested as its shape"),
        ([1, 2, 3, [4]], "FP32", "Got one of type list"),
        ([1, 2, 3, "4"], "FP32", "Got one of type str"),
        ([1, 2, 3, None], "FP32", "Got one of type NoneType"),
        ([1, 2, 3, True], "FP32", "Got one of type bool"),
        ([1, 2, 3, 4.5], "INT32", "Got one of type float"),
        ([1, 0, 1, 0], "BOOL", "Got one of type int"),
        ([1, 2, 3, 2**31], "INT32", "number that int32 cannot"),
        ([1, 2, 3, -1], "UINT8", "number that uint8 cannot"),
        ([1, 2, 3, 10**400], "UINT64", "number that uint64 cannot"),
        ([1, 2, 3, 10**400], "FP64", "number that float64 cannot"),
        ([1, 2, 3, 1e39], "FP32", "number that float32 cannot"),
        ([1, 2, 3, 70000.0], "FP16", "number that float16 cannot"),
        ([1, 2, 3, float("nan")], "FP32", "number that float32 cannot"),
        ({"0": 1}, "FP32", "must be a list. Got dict"),
        (None, "FP32", "must be a list. Got NoneType"),
        ("1234", "FP32", "must be a list. Got str"),
    ],
)
def test_values_that_are_refused(data, datatype, words):
    with pytest.raises(PayloadError, match=words):
        from_values("x", data, (2, 2), DATATYPES[datatype])


def test_json_has_no_words_for_nan():
    with pytest.raises(PayloadError, match="binary data"):
        to_values("y", np.array([np.nan]))


def test_messages_are_short_whatever_came():
    with pytest.raises(PayloadError) as refused:
        checked_shape("x" * 10**6, ["y" * 10**6], np.dtype("int8"), 10)
    assert len(str(refused.value)) < 400
