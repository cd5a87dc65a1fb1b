"""One ONNX file for single samples: steps nested in ``If`` nodes, which skip what is not needed.

Step by step, a single sample pays for a call from Python at every step. In one graph it pays once:
after a step, ``If`` leave, the answer is handed out; else the graph of the next step runs, which
holds its own weights and the ``If`` after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from offramp.exporting.joining import RenamedGraph, save_joined
from offramp.runtime.bundle import SINGLE_OUTPUTS, Step, single_numbers

if TYPE_CHECKING:
    import onnx

_ANSWERS = 2
"""Output and confidence, the first outputs of a step; then come leave and what is carried."""


def write_single(folder: Path, steps: Sequence[Step], path: Path) -> None:
    """Join the steps of a bundle into one ONNX file for batches of one.

    Its inputs are those of the first step. Temperatures and thresholds are initialisers that
    whoever loads the file may replace. It puts out logits, confidence, and the number of the step
    that the sample left by, each with a batch axis.
    """
    import onnx
    from onnx import helper, numpy_helper

    models = [onnx.load(folder / step.file) for step in steps]
    numbers_of_steps = [list(step.numbers) for step in steps]
    inputs = list(models[0].graph.input)[: -len(numbers_of_steps[0])]
    nodes, weights = _nested(models, numbers_of_steps, 0, [value.name for value in inputs])
    numbers = [
        numpy_helper.from_array(np.array(value, dtype=np.float32), name)
        for name, value in single_numbers(steps).items()
    ]
    graph = helper.make_graph(
        nodes, "single", inputs, _outputs(SINGLE_OUTPUTS, models), initializer=[*numbers, *weights]
    )
    save_joined(graph, models, path)


def _nested(
    models: Sequence[onnx.ModelProto],
    numbers_of_steps: Sequence[Sequence[str]],
    index: int,
    carried: Sequence[str],
    suffix: str = "",
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes and weights of a step and, inside an ``If``, of all that follow.

    They put out :data:`SINGLE_OUTPUTS`, each with the suffix.
    """
    from onnx import helper

    is_last = index == len(models) - 1
    answers = [f"{name}{suffix}" for name in SINGLE_OUTPUTS]
    numbers = [f"{name}_{index}" for name in numbers_of_steps[index]]
    step = RenamedGraph(models[index].graph, f"step_{index}/", [*carried, *numbers])
    if is_last:
        step.name_outputs(answers[:_ANSWERS])
        return [*step.nodes(_ANSWERS), _number_of_step(index, answers[-1])], step.weights()
    output, confidence, leave, *carried = step.outputs()
    stopped = [f"{name}_stopped_{index}" for name in SINGLE_OUTPUTS]
    stop = helper.make_graph(
        [
            helper.make_node("Identity", [output], [stopped[0]]),
            helper.make_node("Identity", [confidence], [stopped[1]]),
            _number_of_step(index, stopped[2]),
        ],
        f"stop_{index}",
        [],
        _outputs(stopped, models),
    )
    nodes, weights = _nested(models, numbers_of_steps, index + 1, carried, f"_after_{index}")
    after = [f"{name}_after_{index}" for name in SINGLE_OUTPUTS]
    go_on = helper.make_graph(
        nodes, f"go_on_{index}", [], _outputs(after, models), initializer=weights
    )
    branch = helper.make_node("If", [leave], answers, then_branch=stop, else_branch=go_on)
    return [*step.nodes(), branch], step.weights()


def _number_of_step(index: int, name: str) -> onnx.NodeProto:
    from onnx import helper, numpy_helper

    return helper.make_node(
        "Constant", [], [name], value=numpy_helper.from_array(np.array([index]), f"{name}_value")
    )


def _outputs(names: Sequence[str], models: Sequence[onnx.ModelProto]) -> list[onnx.ValueInfoProto]:
    """Describe logits and confidence, of the types that the steps have, and the step's number."""
    from onnx import TensorProto, helper

    answers = list(models[0].graph.output)[:_ANSWERS]
    types = [*(value.type.tensor_type.elem_type for value in answers), TensorProto.INT64]
    return [
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in zip(names, types, strict=True)
    ]
