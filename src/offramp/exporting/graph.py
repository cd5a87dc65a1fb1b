"""One ONNX file for single samples: the parts of a bundle in one graph, with branches.

Part by part, a single sample pays for a call from Python at every part. In one graph it pays once:
what it may not need lies inside an ``If``, which holds its own weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from offramp.runtime import Bundle
from offramp.runtime.files import file_sha256

SINGLE_FILE = "single.onnx"

_SHARED_BYTES = 1024
"""From so many on, a weight that is held already is not held again. Smaller ones are numbers of an
operation, which onnxruntime wants beside it."""


class Graph:
    """A graph that is put together of parts and nodes, or a branch of one.

    Names are made here, and stand apart in all branches. What nobody needs is left out in the end.
    """

    def __init__(self, models: Mapping[str, onnx.ModelProto], around: Graph | None = None) -> None:
        self._models = models
        self._taken: Counter[str] = Counter() if around is None else around._taken
        self._types: dict[str, onnx.TypeProto] = {} if around is None else around._types
        self._shared: dict[bytes, str] = {} if around is None else dict(around._shared)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._numbers: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []

    def take_inputs(self, file: str, num_inputs: int | None = None) -> list[str]:
        """Give the graph the first inputs of a part, of one sample; what they are called."""
        self._inputs = [
            helper.make_value_info(self._name(value.name), _of_one_sample(value.type))
            for value in self._models[file].graph.input[:num_inputs]
        ]
        return [value.name for value in self._inputs]

    def num_axes(self, file: str) -> int:
        """Axes of a part's first input."""
        return len(self._models[file].graph.input[0].type.tensor_type.shape.dim)

    def number(self, name: str, value: float) -> None:
        """Add a number that whoever loads the file may replace."""
        array = np.array(value, dtype=np.float32)
        self._numbers.append(numpy_helper.from_array(array, self._name(name)))

    def constant(self, value: npt.ArrayLike) -> str:
        """Add whole numbers that stay; what they are called."""
        array, name = np.array(value, dtype=np.int64), self._name("constant")
        self._weights.append(numpy_helper.from_array(array, name))
        return self.declare(name, self._weights[-1].data_type, array.shape)

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add an operation; what its output is called."""
        output = self._name(kind.lower())
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def opposite(self, name: str) -> str:
        """The opposite of a condition: what a ``Not`` was given that made it, as a rule."""
        made_by = next((node for node in self._nodes if name in node.output), None)
        if made_by is not None and made_by.op_type == "Not":
            return str(made_by.input[0])
        return self.node("Not", [name])

    def add(self, file: str, inputs: Sequence[str]) -> list[str]:
        """Add a part, its inputs by their names here; what its outputs are called."""
        graph, prefix = self._models[file].graph, Path(file).stem
        # An optional input that is left out has the empty name.
        names = {"": "", **dict(zip((v.name for v in graph.input), inputs, strict=True))}
        for weight in graph.initializer:
            names[weight.name] = self._hold(weight, prefix)
        nodes = _copies(graph.node)
        for name in _defined(nodes):
            names.setdefault(name, self._name(f"{prefix}/{name}"))
        _rename(nodes, names)
        for node in nodes:
            node.name = self._name(f"{prefix}/{node.name}")
        self._nodes += nodes
        for value in graph.output:
            self._types[names[value.name]] = _of_one_sample(value.type)
        return [names[value.name] for value in graph.output]

    def choose(
        self,
        condition: str,
        then: Callable[[Graph], Sequence[str]],
        other: Callable[[Graph], Sequence[str]],
    ) -> list[str]:
        """Add an ``If``; each branch is filled by a function, which says what it puts out."""
        graphs, outputs = [], []
        for fill in (then, other):
            branch = Graph(self._models, self)
            made = [branch._made_inside(name) for name in fill(branch)]
            values = [onnx.ValueInfoProto(name=name) for name in made]
            graphs.append(branch._finished(self._name("branch"), values))
            outputs.append(made)
        names = [self._name("either") for _ in outputs[0]]
        for name, *of_branches in zip(names, *outputs, strict=True):
            types = [self._types[each] for each in of_branches if each in self._types]
            if len(types) == len(graphs):
                self._types[name] = _common(*types)
        then_branch, else_branch = graphs
        branches = {"then_branch": then_branch, "else_branch": else_branch}
        self._nodes.append(helper.make_node("If", [condition], names, **branches))
        return names

    def declare(self, name: str, kind: int, shape: Sequence[int]) -> str:
        """Say of what type a value is that no part puts out."""
        self._types[name] = helper.make_tensor_type_proto(kind, shape)
        return name

    def save(self, path: Path, outputs: Mapping[str, str]) -> None:
        """Write the graph; its outputs get the names that they shall have in the file."""
        made = {name: self._made_inside(value) for name, value in outputs.items()}
        _rename(self._nodes, {value: name for name, value in made.items()})
        values = [helper.make_value_info(name, self._types[each]) for name, each in made.items()]
        graph = self._finished("single", values)
        opsets: dict[str, int] = {}
        for opset in chain(*(model.opset_import for model in self._models.values())):
            opsets[opset.domain] = max(opset.version, opsets.get(opset.domain, 0))
        version = max(model.ir_version for model in self._models.values())
        imports = [helper.make_opsetid(*opset) for opset in opsets.items()]
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=version), path)

    def _name(self, wanted: str) -> str:
        """The name, or one with a number behind it where it is taken."""
        self._taken[wanted] += 1
        times = self._taken[wanted]
        return wanted if times == 1 else self._name(f"{wanted}_{times}")

    def _hold(self, weight: onnx.TensorProto, prefix: str) -> str:
        """Hold a weight of a part if it is not held yet; what it is called."""
        key = None
        if len(weight.raw_data) >= _SHARED_BYTES:
            kind = f"{weight.data_type} {list(weight.dims)} ".encode()
            key = hashlib.sha256(kind + weight.raw_data).digest()
        if key in self._shared:
            return self._shared[key]
        (copy,) = _copies([weight])
        copy.name = self._name(f"{prefix}/{weight.name}")
        self._weights.append(copy)
        if key is not None:
            self._shared[key] = copy.name
        return str(copy.name)

    def _made_inside(self, name: str) -> str:
        """The value; its copy if no node of this graph makes it, since others cannot be put out."""
        if any(name in node.output for node in self._nodes):
            return name
        copy = self.node("Identity", [name])
        if name in self._types:
            self._types[copy] = self._types[name]
        return copy

    def _finished(self, name: str, outputs: Sequence[onnx.ValueInfoProto]) -> onnx.GraphProto:
        """The graph, of what its outputs need."""
        needed = {value.name for value in outputs}
        kept = []
        for node in reversed(self._nodes):
            if not needed.isdisjoint(node.output):
                needed.update(_used([node]))
                kept.append(node)
        weights = [weight for weight in self._weights if weight.name in needed]
        return helper.make_graph(
            kept[::-1], name, self._inputs, outputs, initializer=[*self._numbers, *weights]
        )


Join = Callable[[Graph, Bundle], Mapping[str, str]]
"""Puts the parts of a bundle together; the outputs by the names that they shall have."""


def write_single(
    bundle: Bundle, join: Join, models: Mapping[str, onnx.ModelProto] | None = None
) -> Bundle:
    """Write the file for single samples; the bundle with it.

    Models that are not told of are read from the bundle.
    """
    if models is None:
        names = [file.name for file in bundle.files if file.name != bundle.plain_file]
        models = {name: onnx.load(bundle.folder / name) for name in names}
    path = bundle.folder / SINGLE_FILE
    graph = Graph(models)
    graph.save(path, join(graph, bundle))
    return replace(bundle, single_file=path.name, single_sha256=file_sha256(path))


def _copies(protos: Iterable[Any]) -> list[Any]:
    copies = []
    for proto in protos:
        copies.append(type(proto)())
        copies[-1].CopyFrom(proto)
    return copies


def _inside(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node holds: its branches, or the body of a loop."""
    for attribute in node.attribute:
        yield from ([attribute.g] if attribute.HasField("g") else attribute.graphs)


def _defined(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Names of what nodes make, and of what the graphs that they hold do."""
    for node in nodes:
        yield from node.output
        for graph in _inside(node):
            yield from (value.name for value in (*graph.input, *graph.initializer))
            yield from _defined(graph.node)


def _used(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Names of what nodes are given, and of what the graphs that they hold use."""
    for node in nodes:
        yield from node.input
        for graph in _inside(node):
            yield from (value.name for value in graph.output)
            yield from _used(graph.node)


def _rename(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Give values other names, in the graphs that nodes hold too."""
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for graph in _inside(node):
            for value in (*graph.input, *graph.initializer, *graph.output, *graph.value_info):
                value.name = names.get(value.name, value.name)
            _rename(graph.node, names)


def _of_one_sample(kind: onnx.TypeProto) -> onnx.TypeProto:
    """The type of a tensor with the batch axis first, of one sample."""
    one: onnx.TypeProto = _copies([kind])[0]
    if one.tensor_type.shape.dim:
        one.tensor_type.shape.dim[0].dim_value = 1
    return one


def _common(one: onnx.TypeProto, other: onnx.TypeProto) -> onnx.TypeProto:
    """Keep what two types have in common; names of sizes hold in their own part alone."""
    dims = (each.tensor_type.shape.dim for each in (one, other))
    sizes = [[dim.dim_value or None for dim in each] for each in dims]
    shape = [a if a == b else None for a, b in zip(*sizes, strict=True)]
    return helper.make_tensor_type_proto(one.tensor_type.elem_type, shape)
