"""One ONNX file for single samples of a network whose tokens halt.

Behind every step the tokens that go on are taken out; what follows lies inside an ``If``, which an
answered sample does not enter. Steps inside hold their own weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from offramp.exporting.joining import RenamedGraph, save_joined
from offramp.runtime.files import OnnxFile
from offramp.runtime.halting_parts import HALTING_OUTPUTS, HaltingParts

if TYPE_CHECKING:
    import onnx

THRESHOLD = "threshold"
"""The initialiser that whoever loads the file may replace."""


def write_halting_single(
    folder: Path,
    parts: HaltingParts,
    steps: Sequence[OnnxFile],
    path: Path,
    *,
    has_padding: bool,
) -> None:
    """Join the parts of a bundle into one ONNX file for batches of one.

    It puts out logits, confidence, and the tokens in each step, each with a batch axis.
    """
    from onnx import TensorProto, helper, numpy_helper

    joined = _Joined(folder, steps)
    embed = joined.load(parts.embed, [spec.name for spec in parts.inputs], "embed/")
    nodes, tokens = _unpadded(embed.outputs(), has_padding=has_padding)
    numbers = {
        THRESHOLD: np.array(parts.threshold, dtype=np.float32),
        "batch_axis": np.array([0]),
        "first": np.array(0),
        **{f"none_after_{k}": np.zeros(len(steps) - 1 - k, np.int64) for k in range(len(steps))},
    }
    inside, weights = joined.step(0, tokens, "total", None)
    answer, counts = _RESULTS
    head = joined.load(parts.head, [f"{answer}_0"], "head/")
    head.name_outputs(HALTING_OUTPUTS[:2])
    nodes = [
        *embed.nodes(),
        *nodes,
        *inside,
        *head.nodes(),
        helper.make_node("Unsqueeze", [f"{counts}_0", "batch_axis"], [HALTING_OUTPUTS[2]]),
    ]
    kinds = (*(value.type.tensor_type.elem_type for value in joined.answers), TensorProto.INT64)
    graph = helper.make_graph(
        nodes,
        "single",
        joined.models[0].graph.input,
        [
            helper.make_tensor_value_info(name, kind, None)
            for name, kind in zip(HALTING_OUTPUTS, kinds, strict=True)
        ],
        initializer=[
            *(numpy_helper.from_array(value, name) for name, value in numbers.items()),
            *embed.weights(),
            *weights,
            *head.weights(),
        ],
    )
    save_joined(graph, joined.models, path)


def _unpadded(embedded: Sequence[str], *, has_padding: bool) -> tuple[list[onnx.NodeProto], str]:
    """The tokens of a sample without padding, what they are called, and sums of no scores."""
    from onnx import helper, numpy_helper

    x_BTD, is_valid_BT = embedded
    nodes = [helper.make_node("Squeeze", [x_BTD, "batch_axis"], ["all_tokens"])]
    tokens = "all_tokens"
    if has_padding:
        tokens = "unpadded"
        nodes += [
            helper.make_node("Squeeze", [is_valid_BT, "batch_axis"], ["is_valid"]),
            helper.make_node("Compress", ["all_tokens", "is_valid"], [tokens], axis=0),
        ]
    zero = numpy_helper.from_array(np.zeros(1, np.float32))
    nodes += [
        helper.make_node("Shape", [tokens], ["count_0"], start=0, end=1),
        helper.make_node("ConstantOfShape", ["count_0"], ["total"], value=zero),
    ]
    return nodes, tokens


_RESULTS = ("sum", "counts")
"""What a step and all that follow put out, with the number of the step: the answer of a sample that
reaches it, and the tokens in each step."""


class _Joined:
    """Steps nested in ``If`` nodes."""

    def __init__(self, folder: Path, steps: Sequence[OnnxFile]) -> None:
        self._folder = folder
        self._steps = steps
        self.models: list[onnx.ModelProto] = []

    @property
    def answers(self) -> Sequence[onnx.ValueInfoProto]:
        """What the last file that was loaded puts out."""
        outputs: Sequence[onnx.ValueInfoProto] = self.models[-1].graph.output
        return outputs

    def load(self, file: OnnxFile, inputs: Sequence[str], prefix: str) -> RenamedGraph:
        """Load a file; its inputs get the names that they have outside."""
        import onnx

        model = onnx.load(self._folder / file.name)
        self.models.append(model)
        return RenamedGraph(model.graph, prefix, inputs)

    def step(
        self, k: int, tokens: str, total: str, answer: str | None
    ) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """Nodes and weights of a step and all that follow; they put out ``_RESULTS``."""
        from onnx import helper

        results = [f"{name}_{k}" for name in _RESULTS]
        graph = self.load(self._steps[k], [tokens, total, THRESHOLD], f"step_{k}/")
        next_tokens, next_total, stays, part = graph.outputs()
        nodes = graph.nodes()
        is_last = k == len(self._steps) - 1
        so_far = results[0] if is_last else f"answer_{k}"
        if answer is None:
            nodes.append(helper.make_node("Identity", [part], [so_far]))
        else:
            nodes.append(helper.make_node("Add", [answer, part], [so_far]))
        counts = [f"count_{index}" for index in range(k + 1)]
        if is_last:
            nodes.append(helper.make_node("Concat", counts, [results[1]], axis=0))
            return nodes, graph.weights()
        nodes += [
            helper.make_node("Gather", [stays, "first"], [f"goes_on_{k}"]),
            helper.make_node(
                "If",
                [f"goes_on_{k}"],
                results,
                then_branch=self._go_on(k, (next_tokens, next_total), stays, so_far),
                else_branch=self._stop(k, so_far, counts),
            ),
        ]
        return nodes, graph.weights()

    def _go_on(
        self, k: int, handed_on: tuple[str, str], stays: str, so_far: str
    ) -> onnx.GraphProto:
        """The next step, on the tokens that stay."""
        from onnx import helper

        kept = [f"kept_{k}", f"kept_total_{k}"]
        nodes = [
            helper.make_node("Compress", [given, stays], [name], axis=0)
            for given, name in zip(handed_on, kept, strict=True)
        ]
        count = helper.make_node("Shape", [kept[0]], [f"count_{k + 1}"], start=0, end=1)
        inside, weights = self.step(k + 1, kept[0], kept[1], so_far)
        outputs = _described([f"{name}_{k + 1}" for name in _RESULTS])
        return helper.make_graph(
            [*nodes, count, *inside], f"go_on_{k}", [], outputs, initializer=weights
        )

    def _stop(self, k: int, so_far: str, counts: Sequence[str]) -> onnx.GraphProto:
        """The answer as it is, and no tokens in the steps that follow."""
        from onnx import helper

        stopped = [f"{name}_stopped_{k}" for name in _RESULTS]
        nodes = [
            helper.make_node("Identity", [so_far], [stopped[0]]),
            helper.make_node("Concat", [*counts, f"none_after_{k}"], [stopped[1]], axis=0),
        ]
        return helper.make_graph(nodes, f"stop_{k}", [], _described(stopped))


def _described(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    from onnx import TensorProto, helper

    kinds = (TensorProto.FLOAT, TensorProto.INT64)
    return [
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in zip(names, kinds, strict=True)
    ]
