from dataclasses import replace

import numpy as np
import pytest

from offramp.errors import InvalidArgumentError, PayloadError, ShapeError
from offramp.results import AdaptiveResult
from offramp.runtime import Session, read_bundle
from offramp.runtime.files import TensorSpec
from offramp.serving import RunnerModel, named_inputs


class Fixed:
    """A runner that says the same of every sample."""

    def __init__(self, output, **more):
        self.output, self.more = np.array(output, np.float32), more

    def run(self, *inputs):
        rows = len(inputs[0])
        return AdaptiveResult(
            output=np.repeat(self.output[None], rows, 0),
            exit_index=np.full(rows, 1),
            confidence=np.full(rows, 0.5),
            macs=np.full(rows, 7, np.int32),
            **{name: np.full(rows, value) for name, value in self.more.items()},
        )


def with_input(bundle, spec, **changes):
    step = replace(bundle.steps[0], features=(spec,))
    return replace(bundle, steps=(step, *bundle.steps[1:]), **changes)


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return read_bundle(tiny_bundle)


def test_outputs_of_a_bundle(bundle):
    model = RunnerModel(Session(bundle, threads=1), bundle, name="tiny", version="3")
    found = [(spec.name, spec.dtype, spec.sample_shape) for spec in model.outputs]
    assert found == [
        ("output", "float32", (4,)),
        ("label", "int64", ()),
        ("exit_index", "int64", ()),
        ("confidence", "float32", ()),
        ("macs", "int64", ()),
    ]
    assert (model.name, model.version, model.inputs) == ("tiny", "3", bundle.inputs)
    assert model.metadata["weights_sha256"] == bundle.weights_sha256


def test_outputs_of_a_split_network(bundle):
    runner = Fixed([0, 1, 0, 0], answered_by=1, fell_back=False)
    model = RunnerModel(runner, bundle, name="edge")
    found = model.run([np.zeros((2, 6), np.float32)])
    assert {name: value.tolist() for name, value in found.items()} == {
        "output": [[0, 1, 0, 0]] * 2,
        "label": [1, 1],
        "exit_index": [1, 1],
        "confidence": [0.5, 0.5],
        "macs": [7, 7],
        "answered_by": [1, 1],
        "fell_back": [False, False],
    }
    types = {spec.name: spec.dtype for spec in model.outputs}
    assert (types["answered_by"], types["fell_back"]) == ("int64", "bool")


def test_labels_of_every_pixel_have_the_size_of_the_image(bundle):
    spec = TensorSpec(name="image", dtype="float32", sample_shape=(3, None, None))
    dense = with_input(bundle, spec, pixel_multiple=4)
    model = RunnerModel(Fixed(np.zeros((5, 4, 6))), dense, name="dense")
    label = model.run([np.zeros((2, 3, 8, 12), np.float32)])["label"]
    assert (label.shape, label.dtype) == ((2, 8, 12), np.uint8)
    shapes = {spec.name: spec.sample_shape for spec in model.outputs}
    assert (shapes["output"], shapes["label"]) == ((5, None, None), (None, None))


def test_example_of_text_is_not_padding(bundle):
    seen = []

    class Seeing(Fixed):
        def run(self, *inputs):
            seen.extend(inputs)
            return super().run(*inputs)

    spec = TensorSpec(name="ids", dtype="int64", sample_shape=(None,))
    RunnerModel(Seeing([0, 1]), with_input(bundle, spec), name="text")
    assert seen[0].tolist() == [[1] * 8]


@pytest.mark.parametrize("name", ["", "a/b", "-a", "a b", "a" * 101, "ä"])
def test_names_that_would_not_do_in_an_address(bundle, name):
    with pytest.raises(InvalidArgumentError, match="letters, digits, dots"):
        RunnerModel(Fixed([0, 1]), bundle, name=name)


def test_what_prepare_refuses(bundle):
    model = RunnerModel(Fixed([0, 1]), bundle, name="tiny")
    good = np.zeros((1, 6), np.float32)
    assert model.prepare({"features_0": good}, {})[0].shape == (1, 6)
    for inputs, words in (
        ({}, "Expected the inputs features_0. Got none"),
        ({"features_0": good, "x": good}, "Got features_0, x"),
        ({"features_0": good.astype(np.float64)}, "type float32. Got float64"),
        ({"features_0": np.full_like(good, np.inf)}, "NaN or infinity"),
    ):
        with pytest.raises(PayloadError, match=words):
            model.prepare(inputs, {})
    with pytest.raises(ShapeError, match=r"\(B, 6\)"):
        model.prepare({"features_0": good[:, :5].copy()}, {})


def test_named_inputs_come_in_order():
    specs = [TensorSpec(name=name, dtype="int8", sample_shape=()) for name in "ab"]
    given = {"b": np.zeros(2, np.int8), "a": np.ones(2, np.int8)}
    assert [array.tolist() for array in named_inputs(specs, given)] == [[1, 1], [0, 0]]
