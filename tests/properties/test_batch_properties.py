"""However labels are written down, they are the same batch; or they are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.data.batches import read_batch
from offramp.data.labels import read_labels
from offramp.errors import DataError

TYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CLASSES = st.integers(2, 9).flatmap(
    lambda count: st.tuples(st.just(count), st.lists(st.integers(0, count - 1), min_size=2))
)


@given(CLASSES, st.sampled_from(TYPES + FLOATS), st.booleans(), st.booleans())
def test_types_and_shapes_of_the_same_labels_give_the_same_batch(drawn, dtype, is_hot, is_array):
    num_classes, classes = drawn
    labels = torch.tensor(classes)
    written = torch.eye(num_classes)[labels].to(dtype) if is_hot else labels.to(dtype)
    shapes = [written] if is_hot else [written, written[:, None], written.tolist()]
    if is_array and dtype != torch.bfloat16:
        shapes = [np.asarray(shape) for shape in shapes]
    for shape in shapes:
        inputs, found = read_batch((torch.zeros(len(labels), 20), shape))
        assert inputs[0].shape == (len(labels), 20)
        assert found.dtype == torch.int64
        assert torch.equal(found, labels)


@given(st.lists(st.floats(-3, 9, width=32), min_size=1))
def test_floats_that_are_no_whole_numbers_are_refused(values):
    labels = torch.tensor(values)
    if all(value.is_integer() for value in values):
        assert read_labels(labels, num_samples=len(values)).tolist() == [int(v) for v in values]
    else:
        with pytest.raises(DataError, match="whole numbers"):
            read_labels(labels, num_samples=len(values))


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1))
def test_rows_of_bits_are_classes_only_where_each_has_a_single_one(rows):
    labels = torch.tensor(rows)
    if all(sum(row) == 1 for row in rows):
        assert read_labels(labels, num_samples=len(rows)).tolist() == [r.index(True) for r in rows]
    else:
        with pytest.raises(DataError, match="single 1"):
            read_labels(labels, num_samples=len(rows))
