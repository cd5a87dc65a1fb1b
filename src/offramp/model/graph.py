"""Cutting the graph of a backbone that torch.fx can trace: shortcuts, branches, several tensors.

The graph is a list of nodes in the order they run. A cut divides the list; what is made before
it and read after it crosses. What does not depend on the inputs, such as a position embedding,
does not cross: it is made anew where it is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from offramp.errors import reason
from offramp.measure.cost import evaluation_mode
from offramp.model.multi_exit import Features


class NotTraceableError(Exception):
    """torch.fx cannot follow this backbone; for :func:`~offramp.add_exits` to catch."""


class Graph:
    """The traced graph of a backbone, and where it can be cut.

    Args:
        backbone: The backbone.
        inputs: One batch of its inputs, each with the batch axis first.
    Raises:
        NotTraceableError: If torch.fx cannot trace it, as where it takes other steps in training
            than in evaluation.
    """

    num_read = 1
    ragged = None

    def __init__(self, backbone: nn.Module, inputs: Features) -> None:
        tracer = _trace(backbone, num_inputs=len(inputs))
        self._backbone = backbone
        self._nodes = list(tracer.graph.nodes)
        index = {node: i for i, node in enumerate(self._nodes)}
        self._last_use = {n: max((index[u] for u in n.users), default=-1) for n in self._nodes}
        self._fed = _fed_by_inputs(self._nodes)
        self._found = _record(backbone, tracer.graph, inputs)
        self._output_at: dict[int, fx.Node] = {}
        self.places: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        for path, (last, output) in tracer.ends.items():
            position = index[last] + 1
            why = "it runs more than once" if path in tracer.repeated else None
            why = why or self._why_no_cut(position, output)
            if why is None:
                self.places[path] = position
                self._output_at[position] = output.node
            else:
                self.refused[path] = why

    def is_narrow(self, position: int) -> bool:
        """Whether nothing crosses there but the output of the module that ends there."""
        return len(self._crossing(position)) == 1

    def stages(self, positions: Sequence[int]) -> list[nn.Module]:
        """The slices between positions, as ``fx.GraphModule`` that share the backbone's modules."""
        crossing = [self._nodes_handed_on(position) for position in positions]
        placeholders = [node for node in self._nodes if node.op == "placeholder"]
        (final,) = self._nodes[-1].all_input_nodes
        between = pairwise((0, *positions, len(self._nodes) - 1))
        handed = pairwise((placeholders, *crossing, [final]))
        return [
            self._slice(start, end, given, returned)
            for (start, end), (given, returned) in zip(between, handed, strict=True)
        ]

    def _nodes_handed_on(self, position: int) -> list[fx.Node]:
        """What crosses, the output of the module that ends there first."""
        output = self._output_at[position]
        return [output, *(node for node in self._crossing(position) if node is not output)]

    def _crossing(self, position: int) -> list[fx.Node]:
        made = self._nodes[:position]
        return [n for n in made if n in self._fed and self._last_use[n] >= position]

    def _why_no_cut(self, position: int, output: Any) -> str | None:
        """What speaks against a cut after a module with this output; None if nothing does."""
        if not isinstance(output, fx.Proxy) or self._shapes(output.node) is None:
            return "it returns something else than one tensor"
        if position == len(self._nodes) - 1:
            return "the backbone ends there, in the final exit"
        crossing = self._crossing(position)
        if output.node not in crossing:
            return "nothing after it reads its output"
        for node in crossing:
            shapes = self._shapes(node)
            if shapes is None:
                return f"{node.name!r}, which is no tensor, crosses the cut"
            if any(len(shape) == 0 or shape[0] != batch for batch, shape in shapes.items()):
                return f"{node.name!r} of shape {tuple(shapes[1])} crosses it without a batch axis"
        return None

    def _shapes(self, node: fx.Node) -> dict[int, torch.Size] | None:
        """A tensor's shape by batch size; None for another value."""
        shapes = {batch: found[node.name] for batch, found in self._found.items()}
        return None if None in shapes.values() else shapes  # type: ignore[return-value]

    def _slice(
        self, start: int, end: int, given: Sequence[fx.Node], returned: Sequence[fx.Node]
    ) -> fx.GraphModule:
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in given}

        def copy(node: fx.Node) -> fx.Node:
            if node not in copies:
                copies[node] = graph.node_copy(node, copy)
            return copies[node]

        for node in self._nodes[start:end]:
            if node in self._fed and node.op != "placeholder":
                copy(node)
        output = [copy(node) for node in returned]
        graph.output(output[0] if len(output) == 1 else tuple(output))
        return fx.GraphModule(self._backbone, graph, class_name=type(self._backbone).__name__)


class _Tracer(fx.Tracer):
    """Notes after which node each module's run ends, and what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, tuple[fx.Node, Any]] = {}
        self.repeated: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one step: torch's own, and what training mode is read in."""
        is_torchs = super().is_leaf_module(m, module_qualified_name)
        return is_torchs or not any(True for _ in m.children()) or _asks_for_mode(m)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Prepare the call of the backbone, whose ``training`` becomes a node of the graph.

        So a dropout that the backbone calls as a function asks its stage for the mode each time.
        """
        function, arguments = super().create_args_for_root(root_fn, is_module, concrete_args)
        self.root.training = self.create_proxy("get_attr", "training", (), {})  # type: ignore[assignment]
        return function, arguments

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a call, and note its end."""
        output = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        if path in self.ends:
            self.repeated.add(path)
        self.ends[path] = (next(iter(reversed(self.graph.nodes))), output)
        return output


def _asks_for_mode(module: nn.Module) -> bool:
    """Whether its forward reads ``self.training``, which a trace would write down as it is now."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


def _trace(backbone: nn.Module, *, num_inputs: int) -> _Tracer:
    parameters = list(inspect.signature(backbone.forward).parameters.values())
    fixed = {
        parameter.name: parameter.default
        for parameter in parameters[num_inputs:]
        if parameter.default is not inspect.Parameter.empty
    }
    tracer, is_training = _Tracer(), backbone.training
    try:
        graph = tracer.trace(backbone, concrete_args=fixed or None)
    except Exception as error:  # whatever the backbone's own code raises on a stand-in for a tensor
        raise NotTraceableError(reason(error)) from error
    finally:
        backbone.training = is_training
    # Inputs that keep their defaults: the trace only asserts that they do.
    for node in [n for n in graph.nodes if n.op == "placeholder"][num_inputs:]:
        _erase_with_users(graph, node)
    return tracer


def _erase_with_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


def _fed_by_inputs(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    fed: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(source in fed for source in node.all_input_nodes):
            fed.add(node)
    return fed


def _record(
    backbone: nn.Module, graph: fx.Graph, inputs: Features
) -> dict[int, Mapping[str, torch.Size | None]]:
    """Shape of every node's tensor, None for other values, for batches of one and of two."""
    found: dict[int, Mapping[str, torch.Size | None]] = {}
    with evaluation_mode(backbone), torch.no_grad():
        for batch_size in (1, 2):
            recorder = _Recorder(fx.GraphModule(backbone, graph))
            recorder.run(*(t[:1].repeat(batch_size, *(1,) * (t.ndim - 1)) for t in inputs))
            found[batch_size] = recorder.shapes
    return found


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, torch.Size | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.shapes[n.name] = value.shape if isinstance(value, Tensor) else None
        return value
