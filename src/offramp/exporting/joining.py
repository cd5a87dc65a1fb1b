"""Graphs of several ONNX files put into one, whose names must stand apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


class RenamedGraph:
    """A file's graph with other names."""

    def __init__(self, graph: onnx.GraphProto, prefix: str, inputs: Sequence[str]) -> None:
        self._graph = graph
        self._prefix = prefix
        inside = [value.name for value in graph.input]
        # An optional input that is left out has the empty name.
        self._names: dict[str, str] = {"": "", **dict(zip(inside, inputs, strict=True))}

    def name_outputs(self, names: Sequence[str]) -> None:
        """Give the first outputs other names."""
        for value, name in zip(self._graph.output, names, strict=False):
            self._names[value.name] = name

    def outputs(self) -> list[str]:
        """What the outputs are called now."""
        return [self._name(str(value.name)) for value in self._graph.output]

    def nodes(self, num_outputs: int | None = None) -> list[onnx.NodeProto]:
        """The nodes that the first outputs depend on; all outputs if None."""
        import onnx

        needed = {value.name for value in list(self._graph.output)[:num_outputs]}
        kept = []
        for node in reversed(self._graph.node):
            if needed.isdisjoint(node.output):
                continue
            needed.update(node.input)
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{self._prefix}{node.name}"
            copy.input[:] = [self._name(name) for name in node.input]
            copy.output[:] = [self._name(name) for name in node.output]
            kept.append(copy)
        return kept[::-1]

    def weights(self) -> list[onnx.TensorProto]:
        """The initialisers."""
        import onnx

        copies = []
        for weight in self._graph.initializer:
            copy = onnx.TensorProto()
            copy.CopyFrom(weight)
            copy.name = self._name(weight.name)
            copies.append(copy)
        return copies

    def _name(self, name: str) -> str:
        return self._names.setdefault(name, f"{self._prefix}{name}")


def save_joined(graph: onnx.GraphProto, models: Sequence[onnx.ModelProto], path: Path) -> None:
    """Write a graph that was put together from those of several models."""
    import onnx
    from onnx import helper

    opsets = {(opset.domain, opset.version): opset for m in models for opset in m.opset_import}
    version = max(model.ir_version for model in models)
    made = helper.make_model(graph, opset_imports=list(opsets.values()), ir_version=version)
    onnx.save(made, path)
