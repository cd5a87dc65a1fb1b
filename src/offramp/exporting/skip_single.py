"""One ONNX file for single samples of a network that skips blocks: each block inside an ``If``.

Gates lie outside, one after the other; so does what the block in front of them or the way around it
has put out. Blocks hold their own weights.
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

THRESHOLD = "threshold"
"""The initialiser that whoever loads the file may replace."""


def write_skip_single(folder: Path, parts: SkipParts, path: Path) -> None:
    """Join the parts of a bundle into one ONNX file for batches of one.

    It puts out logits, confidence, and which blocks ran, each with a batch axis.

    Args:
        folder: Where the parts' files are.
        parts: The parts.
        path: The file to write.
    """
    from onnx import TensorProto, helper, numpy_helper

    single = _Joined(folder)
    (x,) = single.add(parts.stem, [parts.input.name])
    state: list[str] = []
    ran = []
    for step in parts.steps:
        run, _, *state = single.add(step.gate, [x, *state, THRESHOLD])
        x = single.add_branches(run, step.block, step.around, x)
        ran.append(run)
    answers, blocks = SKIP_OUTPUTS[:-1], SKIP_OUTPUTS[-1]
    single.add(parts.head, [x], answers)
    single.nodes += [
        helper.make_node("Concat", ran, [f"{blocks}_in_a_row"], axis=0),
        helper.make_node("Unsqueeze", [f"{blocks}_in_a_row", "first_axis"], [blocks]),
    ]
    numbers = [
        numpy_helper.from_array(np.array(parts.threshold, dtype=np.float32), THRESHOLD),
        numpy_helper.from_array(np.array([0]), "first_axis"),
    ]
    head_outputs = single.models[-1].graph.output
    types = [*(value.type.tensor_type.elem_type for value in head_outputs), TensorProto.BOOL]
    graph = helper.make_graph(
        single.nodes,
        "single",
        single.models[0].graph.input,
        [
            helper.make_tensor_value_info(name, kind, None)
            for name, kind in zip(SKIP_OUTPUTS, types, strict=True)
        ],
        initializer=[*numbers, *single.weights],
    )
    save_joined(graph, single.models, path)


class _Joined:
    """Files put one after the other into one graph.

    Args:
        folder: Where they are.
    """

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

    def add_branches(self, run: str, block: OnnxFile, around: OnnxFile | None, x: str) -> str:
        """Add an ``If`` that runs a block or goes around it; what its output is called."""
        from onnx import helper

        name = f"behind_{block.name}"
        then = self._branch(block, x)
        if around is None:  # what comes in is handed on
            kind = then.output[0].type.tensor_type.elem_type
            kept = helper.make_tensor_value_info(f"kept_{name}", kind, None)
            keep = helper.make_node("Identity", [x], [kept.name])
            otherwise = helper.make_graph([keep], kept.name, [], [kept])
        else:
            otherwise = self._branch(around, x)
        self.nodes.append(
            helper.make_node("If", [run], [name], then_branch=then, else_branch=otherwise)
        )
        return name

    def _branch(self, file: OnnxFile, x: str) -> onnx.GraphProto:
        """A file as the inside of an ``If``, with its weights."""
        from onnx import helper

        graph = self._load(file, [x])
        (name,) = graph.outputs()
        kind = self.models[-1].graph.output[0].type.tensor_type.elem_type
        output = helper.make_tensor_value_info(name, kind, None)
        return helper.make_graph(
            graph.nodes(), file.name, [], [output], initializer=graph.weights()
        )

    def _load(self, file: OnnxFile, inputs: Sequence[str]) -> RenamedGraph:
        import onnx

        model = onnx.load(self._folder / file.name)
        self.models.append(model)
        return RenamedGraph(model.graph, f"{Path(file.name).stem}/", inputs)
