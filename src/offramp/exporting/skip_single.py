"""One ONNX file for single samples of a network that skips blocks: each block inside an ``If``.

Gates lie outside, one after the other; so does what the block in front of them or the way around it
has put out. Blocks hold their own weights. A small network's gates take longer than their sums do:
every node costs about a microsecond, so that there shall be few.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from offramp.exporting.joining import RenamedGraph, save_joined
from offramp.runtime.files import OnnxFile
from offramp.runtime.skip_parts import SKIP_OUTPUTS, SkipParts

if TYPE_CHECKING:
    import onnx

_AXES_OF_MAPS = 4
THRESHOLD = "threshold"
"""The initialiser that whoever loads the file may replace."""


def write_skip_single(folder: Path, parts: SkipParts, path: Path) -> None:
    """Join the parts of a bundle into one ONNX file for batches of one.

    It puts out logits, confidence, which blocks ran, and the MACs, each with a batch axis.
    """
    from onnx import TensorProto, helper, numpy_helper

    single = _Joined(folder)
    (x,) = single.add(parts.stem, [parts.input.name])
    state: list[str] = []
    skips = []
    for step in parts.steps:
        run, _, *state = single.add(step.gate, [x, *state, THRESHOLD])
        skips.append(single.opposite(run))
        x = single.add_branches(skips[-1], step.block, step.around, x)
    *answers, blocks, macs = SKIP_OUTPUTS
    single.add(parts.head, [x], answers)
    single.nodes += [
        helper.make_node("Concat", skips, ["skips_in_a_row"], axis=0),
        helper.make_node("Unsqueeze", ["skips_in_a_row", "first_axis"], ["skips"]),
        helper.make_node("Not", ["skips"], [blocks]),
        # numpy would take 20 microseconds for it.
        helper.make_node("Cast", [blocks], ["blocks_run"], to=TensorProto.INT64),
        helper.make_node("MatMul", ["blocks_run", "block_macs"], ["macs_of_blocks"]),
        helper.make_node("Add", ["macs_of_blocks", "always_macs"], [macs]),
    ]
    numbers = [
        numpy_helper.from_array(np.array(parts.threshold, dtype=np.float32), THRESHOLD),
        *(
            numpy_helper.from_array(np.array(values, dtype=np.int64), name)
            for name, values in (
                ("first_axis", [0]),
                ("block_macs", [step.block_macs for step in parts.steps]),
                ("always_macs", [parts.always_macs]),
            )
        ),
    ]
    head_outputs = single.models[-1].graph.output
    of_head = (value.type.tensor_type.elem_type for value in head_outputs)
    types = [*of_head, TensorProto.BOOL, TensorProto.INT64]
    graph = helper.make_graph(
        single.nodes,
        "single",
        [_of_one_sample(value, value.name) for value in single.models[0].graph.input],
        [
            helper.make_tensor_value_info(name, kind, None)
            for name, kind in zip(SKIP_OUTPUTS, types, strict=True)
        ],
        initializer=[*numbers, *single.weights],
    )
    save_joined(graph, single.models, path)


def _of_one_sample(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    """The same tensor by another name, with one sample where any number may be, if that is said."""
    from onnx import ValueInfoProto

    one = ValueInfoProto()
    one.CopyFrom(value)
    one.name = name
    if one.type.tensor_type.shape.dim:
        one.type.tensor_type.shape.dim[0].dim_value = 1
    return one


class _Joined:
    """Files put one after the other into one graph."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.models: list[onnx.ModelProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, file: OnnxFile, inputs: Sequence[str], outputs: Sequence[str] = ()) -> list[str]:
        """Add a file; what its outputs are called, the first of them as told."""
        graph = self._load(file, inputs)
        graph.name_outputs(outputs)
        self.nodes += graph.nodes()
        self.weights += graph.weights()
        return graph.outputs()

    def opposite(self, run: str) -> str:
        """The name of what says the opposite of a gate, which ends with a ``Not`` as a rule."""
        from onnx import helper

        if self.nodes[-1].op_type == "Not" and self.nodes[-1].output == [run]:
            return str(self.nodes.pop().input[0])
        skip = f"not_{run}"
        self.nodes.append(helper.make_node("Not", [run], [skip]))
        return skip

    def add_branches(self, skip: str, block: OnnxFile, around: OnnxFile | None, x: str) -> str:
        """Add an ``If`` that goes around a block or runs it; what its output is called."""
        from onnx import helper

        name = f"behind_{block.name}"
        if around is None:
            run, kept = self._block_and_sum(block, x)
        else:
            run, kept = self._branch(block, x), self._branch(around, x)
        self.nodes.append(helper.make_node("If", [skip], [name], then_branch=kept, else_branch=run))
        return name

    def _block_and_sum(self, block: OnnxFile, x: str) -> tuple[onnx.GraphProto, onnx.GraphProto]:
        """A block that adds to what comes in, and the way around it, which hands that on."""
        from onnx import helper

        inside = f"{x}_inside"
        run = self._branch(block, inside)
        # Only what one of its own operations puts out does onnxruntime keep in its layout, and add
        # within a convolution. Pooling single pixels is such an operation, and changes nothing.
        is_map = len(self.models[-1].graph.input[0].type.tensor_type.shape.dim) == _AXES_OF_MAPS
        enter = (
            helper.make_node("MaxPool", [x], [inside], kernel_shape=[1, 1])
            if is_map
            else helper.make_node("Identity", [x], [inside])
        )
        run.node.insert(0, enter)
        kept = _of_one_sample(self.models[-1].graph.output[0], f"kept_{block.name}")
        keep = helper.make_node("Identity", [x], [kept.name])
        return run, helper.make_graph([keep], kept.name, [], [kept])

    def _branch(self, file: OnnxFile, x: str) -> onnx.GraphProto:
        """A file as the inside of an ``If``, with its weights."""
        from onnx import helper

        graph = self._load(file, [x])
        (name,) = graph.outputs()
        output = _of_one_sample(self.models[-1].graph.output[0], name)
        return helper.make_graph(
            graph.nodes(), file.name, [], [output], initializer=graph.weights()
        )

    def _load(self, file: OnnxFile, inputs: Sequence[str]) -> RenamedGraph:
        import onnx

        model = onnx.load(self._folder / file.name)
        self.models.append(model)
        return RenamedGraph(model.graph, f"{Path(file.name).stem}/", inputs)
