"""Cutting the graph of a backbone that torch.fx can trace: shortcuts, branches, several tensors.

The graph is a list of nodes in the order they run. A cut divides the list; what is made before
it and read after it crosses. What does not depend on the inputs, such as a position embedding,
does not cross: it is made anew where it is read.

A graph knows one mode. A backbone that asks ``self.training`` is traced in both and cut in both at
the same modules; each of its stages runs the graph of the mode that it is in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _forward_from_src

from offramp.errors import BackboneCutError, reason
from offramp.measure.cost import evaluation_mode
from offramp.model.multi_exit import Features
from offramp.model.ragged import Ragged
from offramp.model.tracing import NotTraceableError, Tracer, trace


class Graph:
    """The traced graphs of a backbone, and where it can be cut."""

    num_read: int = 1
    ragged: Ragged | None = None

    def __init__(self, backbone: nn.Module, inputs: Features) -> None:
        first, second = (
            trace(backbone, num_inputs=len(inputs), is_training=mode) for mode in (False, True)
        )
        evaluation = training = TracedMode(backbone, first, inputs)
        if not are_equal(first, second):
            training = TracedMode(backbone, second, inputs, is_training=True)
        self._set_modes(evaluation, training)

    def _set_modes(self, evaluation: Mode, training: Mode) -> None:
        self._modes = (evaluation, training)
        self.refused: dict[str, str] = {}
        ends: dict[str, tuple[int, int]] = {}
        for path in evaluation.ends:
            why = self._why_no_cut(path)
            if why is None:
                ends[path] = (evaluation.ends[path][0], training.ends[path][0])
            else:
                self.refused[path] = why
        by_module = {training.after_module(end[0]): end for end in training.narrow.values()}
        paired: dict[str, tuple[int, fx.Node]] = {}  # training's, by their names in evaluation
        latest = 0
        for name, (end, _) in evaluation.narrow.items():
            found = by_module.get(evaluation.after_module(end))
            if found is not None and found[0] > latest:
                paired[name], latest = found, found[0]
        training.narrow = paired
        between = {name: (evaluation.narrow[name][0], end) for name, (end, _) in paired.items()}
        between = {n: both for n, both in between.items() if both not in ends.values()}
        self._ends = sorted({*ends.values(), *between.values()})
        self._named = {end: path for path, end in (*between.items(), *ends.items())}
        self.places: Mapping[str, int] = {p: self._ends.index(end) + 1 for p, end in ends.items()}
        self.between: Mapping[str, int] = {
            n: self._ends.index(both) + 1 for n, both in between.items()
        }

    def is_narrow(self, position: int) -> bool:
        """Return True if only the output of the module that ends there crosses."""
        end = self._ends[position - 1][0]
        return len(self._modes[0].crossing(end)) == 1

    def stages(self, positions: Sequence[int]) -> list[nn.Module]:
        """The slices between positions, which share the backbone's modules."""
        ends = [self._ends[position - 1] for position in positions]
        paths = [self._named[end] for end in ends]
        if sorted(ends, key=lambda end: end[1]) != ends:
            raise BackboneCutError(
                f"There can be no cuts after {', '.join(paths)} together: in training these "
                "modules run in another order. Cut after fewer."
            )
        objects = {name: each for mode in self._modes for name, each in mode.objects.items()}
        both = zip(*(mode.slices(paths) for mode in self._modes), strict=True)
        return [TracedStage(objects, graphs) for graphs in both]

    def _why_no_cut(self, path: str) -> str | None:
        """Return the reason against a cut after a module; None if there is none."""
        evaluation, training = self._modes
        if path not in training.ends:
            return "in training it is not called"
        why = evaluation.why_no_cut(path) or training.why_no_cut(path)
        if why is None:
            crossing = [len(mode.crossing(mode.ends[path][0])) for mode in self._modes]
            if crossing[0] != crossing[1]:
                why = "in training more or fewer tensors cross there"
        return why


class TracedStage(nn.Module):
    """A slice of a traced backbone: its modules and tensors by their paths, and what is run.

    Unlike a ``GraphModule``, which is traced anew when it is unpickled, it keeps its graphs.
    """

    def __init__(self, objects: Mapping[str, Any], graphs: Sequence[fx.Graph]) -> None:
        super().__init__()
        self._graphs = tuple(graphs)
        for graph in self._graphs:
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    self._adopt(node.target, objects[node.target])
        self._compile()

    def forward(self, *features: Tensor) -> Tensor | Features:
        """Map features to features, as the backbone does in this mode."""
        output: Tensor | Features = self._forwards[self.training](self, *features)
        return output

    def _adopt(self, target: str, value: Any) -> None:
        *around, name = target.split(".")
        module: nn.Module = self
        for each in around:
            if each not in module._modules:
                setattr(module, each, nn.Module())
            module = module.get_submodule(each)
        if name in module._modules | module._parameters | module._buffers:
            return  # it came with a module around it, or with the other graph
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            module.register_buffer(name, value)
        else:
            setattr(module, name, value)

    def _compile(self) -> None:
        forwards = {id(graph): _function(graph) for graph in self._graphs}
        self._forwards = tuple(forwards[id(graph)] for graph in self._graphs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_forwards"]  # made of the graphs
        state["_graphs"] = tuple(_with_targets(graph, _named) for graph in self._graphs)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["_graphs"] = tuple(_with_targets(graph, _found) for graph in state["_graphs"])
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()


def _function(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a function of the module that holds its objects.

    A ``GraphModule`` has attributes of its own, such as ``meta``, which a backbone's may be called.
    """
    code = graph.python_code("self")
    return _forward_from_src(code.src, code.globals)


class _Operator(NamedTuple):
    """The name of one of torch's operators, which cannot be pickled."""

    name: str
    overload: str

    def __call__(self) -> None:
        raise NotImplementedError


def _named(target: Any) -> Any:
    if not isinstance(target, torch._ops.OpOverload):
        return target
    return _Operator(target._schema.name, target._overloadname)


def _found(target: Any) -> Any:
    if not isinstance(target, _Operator):
        return target
    packet = getattr(getattr(torch.ops, target.name.split("::")[0]), target.name.split("::")[1])
    return getattr(packet, target.overload)


def _with_targets(graph: fx.Graph, change: Callable[[Any], Any]) -> fx.Graph:
    changed, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        target = change(node.target)
        copies[node] = changed.create_node(node.op, target, args, kwargs, node.name, node.type)
    return changed


class Mode:
    """The graph of a backbone in one mode, and its parts.

    Nodes that are *placed* run where they stand, once. All others are made anew in each part that
    reads them: what does not depend on the inputs, and what is too small to cross.

    Attributes:
        objects: Every module and tensor that the graph names, by its target.
        ends: By path of a module, the position after its run, and what it returns; None where
            that is not one tensor.
        along: Inputs that cross every cut, after the output of the module that ends there.
    """

    along: tuple[fx.Node, ...] = ()

    def __init__(
        self,
        nodes: Sequence[fx.Node],
        *,
        objects: Mapping[str, Any],
        placed: Set[fx.Node],
        ends: Mapping[str, tuple[int, fx.Node | None]],
        repeated: Set[str],
    ) -> None:
        self.objects, self.ends = objects, ends
        self._nodes, self._placed, self._repeated = list(nodes), placed, repeated
        self._final: fx.Node = self._nodes[-1].args[0]  # type: ignore[assignment]
        self._last_use = dict.fromkeys(self._nodes, -1)
        roots: dict[fx.Node, Set[fx.Node]] = {}
        for index, node in enumerate(self._nodes):
            sources = self._sources(node)
            read = {n for s in sources for n in ([s] if s in placed else roots.get(s, ()))}
            roots[node] = read
            if node in placed or node.op == "output":
                self._last_use |= dict.fromkeys(read, index)

    def _sources(self, node: fx.Node) -> Sequence[fx.Node]:
        return node.all_input_nodes

    def slices(self, paths: Sequence[str]) -> list[fx.Graph]:
        """The parts between the ends of modules, one more than there are."""
        positions = [self._end(path)[0] for path in paths]
        crossing = [self._nodes_handed_on(path) for path in paths]
        placeholders = [node for node in self._nodes if node.op == "placeholder"]
        between = pairwise((0, *positions, len(self._nodes) - 1))
        handed = pairwise((placeholders, *crossing, [self._final]))
        return [
            self._slice(start, end, given, returned)
            for (start, end), (given, returned) in zip(between, handed, strict=True)
        ]

    def _end(self, path: str) -> tuple[int, fx.Node | None]:
        return self.ends[path] if path in self.ends else self.narrow[path]

    @cached_property
    def narrow(self) -> dict[str, tuple[int, fx.Node]]:
        """Find where one tensor of floats crosses, batch first, by the node that makes it."""
        found: dict[str, tuple[int, fx.Node]] = {}
        crossing: set[fx.Node] = set()
        until: dict[int, list[fx.Node]] = {}
        for position, node in enumerate(self._nodes[:-2], start=1):
            crossing.difference_update(until.pop(position, ()))
            last = self._last_use[node]
            if node in self._placed and last >= position and not self._is_light(node):
                crossing.add(node)
                until.setdefault(last + 1, []).append(node)
            is_alone = crossing == {node} and node.op != "placeholder" and not _is_state(node)
            # The first run of a module that runs several times has the name of the module.
            name = f"{node.name}_0" if node.name in self.ends else node.name
            if is_alone and self._why_not_across(self.crossing(position), position) is None:
                found[name] = (position, node)
        return {name: end for name, end in found.items() if name not in self.ends}

    def after_module(self, position: int) -> tuple[str, int]:
        """Describe a position for another mode, whose nodes may have other names."""
        before = ((end, path) for path, (end, _) in self.ends.items() if end <= position)
        end, path = max(before, default=(0, ""))
        return path, position - end

    def _is_light(self, node: fx.Node) -> bool:
        """Return True if a node may cross beside features."""
        return False

    def _nodes_handed_on(self, path: str) -> list[fx.Node]:
        """List what crosses: first the output of the module that ends there."""
        position, output = self._end(path)
        assert output is not None
        first = [output, *self.along]
        return [*first, *(n for n in self.crossing(position) if n not in first)]

    def crossing(self, position: int) -> list[fx.Node]:
        """List what is made from the inputs before a position and read after it."""
        made = self._nodes[:position]
        return [n for n in made if n in self._placed and self._last_use[n] >= position]

    def why_no_cut(self, path: str) -> str | None:
        """Return the reason against a cut after a module; None if there is none."""
        if path in self._repeated:
            return "it runs more than once"
        position, output = self.ends[path]
        if output is None or self._shapes(output) is None:
            return "it returns something else than one tensor"
        if position == len(self._nodes) - 1:
            return "the backbone ends there, in the final exit"
        crossing = self.crossing(position)
        if output not in crossing:
            return "nothing after it reads its output"
        return self._why_not_across(crossing, position)

    def _why_not_across(self, crossing: Sequence[fx.Node], position: int) -> str | None:
        """Return the reason against handing nodes on."""
        for node in crossing:
            shapes = self._shapes(node)
            if shapes is None:
                return "something that is no tensor crosses it"
            if self._batch_axis(node) is None:
                shape = tuple(next(iter(shapes.values())))
                return f"a tensor of shape {shape} crosses it without a batch axis"
        return None

    def _shapes(self, node: fx.Node) -> dict[int, torch.Size] | None:
        """A tensor's shape by batch size; None for another value."""
        raise NotImplementedError

    def _batch_axis(self, node: fx.Node) -> int | None:
        """The axis of samples, the first if it is one; None where none, or several, can be it."""
        shapes = self._shapes(node) or {}
        axes = [
            axis
            for axis in range(min(map(len, shapes.values()), default=0))
            if all(shape[axis] == batch for batch, shape in shapes.items())
        ]
        return axes[0] if axes[:1] == [0] or len(axes) == 1 else None

    def _slice(
        self, start: int, end: int, given: Sequence[fx.Node], returned: Sequence[fx.Node]
    ) -> fx.Graph:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in given}
        axes = {node: self._batch_axis(node) for node in {*given, *returned}}
        for node in given:  # samples are first where they cross, and back in their place here
            if axes[node]:
                copies[node] = graph.call_method("movedim", (copies[node], 0, axes[node]))

        def copy(node: fx.Node) -> fx.Node:
            if node not in copies:
                copies[node] = self._copied(node, graph, copies, copy)
                copies[node].meta = {}  # where it came from: classes that may not be pickled
            return copies[node]

        for node in self._nodes[start:end]:
            if node in self._placed and node.op != "placeholder":
                copy(node)
        output = [
            graph.call_method("movedim", (copy(node), axes[node], 0)) if axes[node] else copy(node)
            for node in returned
        ]
        graph.output(output[0] if len(output) == 1 else tuple(output))
        return graph

    def _copied(
        self,
        node: fx.Node,
        graph: fx.Graph,
        copies: dict[fx.Node, fx.Node],
        copy: Callable[[fx.Node], fx.Node],
    ) -> fx.Node:
        return graph.node_copy(node, copy)


def _is_state(node: fx.Node) -> bool:
    """Return True for what a recurrent layer returns beside its output, which no head reads."""
    if node.target is not operator.getitem:
        return False
    whole: Any = node.args[0]
    index: Any = node.args[1]
    return bool(index != 0 or whole.target is operator.getitem)


class TracedMode(Mode):
    """The graph that torch.fx traced in one mode."""

    def __init__(
        self, backbone: nn.Module, tracer: Tracer, inputs: Features, *, is_training: bool = False
    ) -> None:
        nodes = list(tracer.graph.nodes)
        if not isinstance(nodes[-1].args[0], fx.Node):
            mode = "training" if is_training else "evaluation"
            raise NotTraceableError(
                f"in {mode} it returns more than logits: name their place with 'output'"
            )
        index = {node: i for i, node in enumerate(nodes)}
        ends = {
            path: (index[node] + 1, output.node if isinstance(output, fx.Proxy) else None)
            for path, (node, output) in tracer.ends.items()
        }
        super().__init__(
            nodes,
            objects=tracer.objects,
            placed=_fed_by_inputs(nodes),
            ends=ends,
            repeated=tracer.repeated,
        )
        # Where a function normalises over the batch, in training one sample is not enough.
        sizes = (2, 3) if is_training else (1, 2)
        self._found = _record(backbone, tracer, inputs, sizes)
        if self._shapes(self._final) is None:
            raise NotTraceableError(
                "it returns something else than a tensor of logits: return the logits alone"
            )

    def _shapes(self, node: fx.Node) -> dict[int, torch.Size] | None:
        shapes = {batch: found[node.name] for batch, found in self._found.items()}
        return None if None in shapes.values() else shapes  # type: ignore[return-value]


def _fed_by_inputs(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    fed: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(source in fed for source in node.all_input_nodes):
            fed.add(node)
    return fed


def _record(
    backbone: nn.Module, tracer: Tracer, inputs: Features, batch_sizes: Sequence[int]
) -> dict[int, Mapping[str, torch.Size | None]]:
    """Shape of every node's tensor, None for other values, by batch size."""
    found: dict[int, Mapping[str, torch.Size | None]] = {}
    statistics = [(buffer, buffer.clone()) for buffer in backbone.buffers()]
    with evaluation_mode(backbone), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for batch_size in batch_sizes:
            recorder = _Recorder(backbone, tracer)
            try:
                recorder.run(*(t[:1].repeat(batch_size, *(1,) * (t.ndim - 1)) for t in inputs))
            except Exception as error:  # whatever its modules raise
                raise NotTraceableError(
                    f"it fails on a batch of {batch_size}: {reason(error)}"
                ) from error
            finally:
                for buffer, value in statistics:
                    buffer.data.copy_(value)
            found[batch_size] = recorder.shapes
    return found


def are_equal(first: Tracer, second: Tracer) -> bool:
    """Return True if two graphs of a backbone do the same with the same parts."""
    codes = {tracer.graph.python_code("self").src for tracer in (first, second)}
    return len(codes) == 1 and all(
        each is second.objects[name]
        or (isinstance(each, Tensor) and torch.equal(each, second.objects[name]))
        for name, each in first.objects.items()
    )


class _Recorder(fx.Interpreter):
    def __init__(self, backbone: nn.Module, tracer: Tracer) -> None:
        super().__init__(backbone, graph=tracer.graph)
        self._objects = tracer.objects
        self.shapes: dict[str, torch.Size | None] = {}

    def fetch_attr(self, target: str) -> Any:
        return self._objects[target]

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            # torch.fx adds pages about its graph to what an error says.
            raise RuntimeError(reason(error)) from error
        self.shapes[n.name] = value.shape if isinstance(value, Tensor) else None
        return value
