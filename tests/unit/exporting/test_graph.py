"""Parts joined into one graph, of models made by hand."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from offramp.exporting.graph import Graph

FLOAT = TensorProto.FLOAT
LARGE = np.arange(400, dtype=np.float32)
X = np.ones((1, 400), dtype=np.float32)


def model(nodes, inputs=("x",), **weights):
    """A part that puts out y; all its tensors are rows of 400 numbers."""
    shape = ["batch", 400]
    graph = helper.make_graph(
        [
            helper.make_node(kind, given, made, **attributes)
            for kind, given, made, attributes in nodes
        ],
        "part",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name in inputs],
        [helper.make_tensor_value_info("y", FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def plus(weight):
    return model([("Add", ["x", "w"], ["y"], {})], w=weight)


def saved(graph, path, value):
    graph.save(path, {"output": value})
    found = onnx.load(path)
    onnx.checker.check_model(found, full_check=True)
    onnx.shape_inference.infer_shapes(found, check_type=True, strict_mode=True)
    return found.graph


def run(path, **inputs):
    return onnxruntime.InferenceSession(path).run(None, inputs)[0]


def test_a_part_may_come_twice_and_a_weight_is_held_once(tmp_path):
    graph = Graph({"one.onnx": plus(LARGE), "two.onnx": plus(LARGE), "small.onnx": plus(LARGE[:1])})
    (x,) = graph.take_inputs("one.onnx")
    for file in ("one.onnx", "one.onnx", "two.onnx", "small.onnx", "small.onnx"):
        (x,) = graph.add(file, [x])
    found = saved(graph, tmp_path / "single.onnx", x)
    assert sorted(weight.dims[0] for weight in found.initializer) == [1, 1, 400]
    assert [d.dim_value for d in found.input[0].type.tensor_type.shape.dim] == [1, 400]
    assert [d.dim_value for d in found.output[0].type.tensor_type.shape.dim] == [1, 400]
    np.testing.assert_array_equal(run(tmp_path / "single.onnx", x=X), X + 3 * LARGE)


@pytest.mark.parametrize("threshold", [0.0, 1e9])
def test_branches_hold_what_they_alone_need_and_may_hand_on_what_they_are_given(
    tmp_path, threshold
):
    graph = Graph({"one.onnx": plus(LARGE), "two.onnx": plus(-LARGE)})
    graph.number("threshold", 0.5)
    (x,) = graph.add("one.onnx", graph.take_inputs("one.onnx"))
    total = graph.node("ReduceSum", [x], keepdims=0)
    runs = graph.node("GreaterOrEqual", [total, "threshold"])

    def twice(branch):
        return branch.add("one.onnx", branch.add("two.onnx", [x]))

    (y,) = graph.choose(runs, twice, lambda _: [x])
    found = saved(graph, tmp_path / "single.onnx", y)
    branches = {one.name: one.g for one in found.node[-1].attribute}
    (held,) = branches["then_branch"].initializer  # that of part one is held outside
    np.testing.assert_array_equal(numpy_helper.to_array(held), -LARGE)
    assert [node.op_type for node in branches["else_branch"].node] == ["Identity"]
    options = onnxruntime.SessionOptions()
    number = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(threshold, dtype=np.float32))
    options.add_initializer("threshold", number)
    session = onnxruntime.InferenceSession(tmp_path / "single.onnx", options)
    np.testing.assert_array_equal(session.run(None, {"x": X})[0], X + LARGE)


def test_parts_that_branch_themselves_keep_their_names_apart(tmp_path):
    def branch(kind):
        made = helper.make_tensor_value_info("inner", FLOAT, None)
        nodes = [helper.make_node(kind, ["x", "w"], ["inner"])]
        return helper.make_graph(nodes, kind, [], [made])

    part = model(
        [
            ("ReduceSum", ["x"], ["sum"], {"keepdims": 0}),
            ("Less", ["sum", "least"], ["is_less"], {}),
            (
                "If",
                ["is_less"],
                ["y"],
                {"then_branch": branch("Add"), "else_branch": branch("Sub")},
            ),
        ],
        w=LARGE,
        least=np.float32(1000),
    )
    graph = Graph({"part.onnx": part})
    (x,) = graph.take_inputs("part.onnx")
    for _ in range(2):
        (x,) = graph.add("part.onnx", [x])
    saved(graph, tmp_path / "single.onnx", x)
    np.testing.assert_array_equal(run(tmp_path / "single.onnx", x=X), X)  # up, then down again


def test_what_nobody_needs_is_left_out(tmp_path):
    graph = Graph({"one.onnx": plus(LARGE), "two.onnx": plus(-LARGE)})
    (x,) = graph.add("one.onnx", graph.take_inputs("one.onnx"))
    graph.add("two.onnx", [x])
    found = saved(graph, tmp_path / "single.onnx", x)
    assert [node.op_type for node in found.node] == ["Add"]
    assert len(found.initializer) == 1
