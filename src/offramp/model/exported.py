"""Cutting the graph of a backbone that torch.export can trace: what torch.fx cannot follow.

torch.export runs the backbone's code on tensors whose batch axis has no fixed size, once a mode,
and writes down torch's operations. Modules of torch's own are put back in the place of the
operation that they did, so that stages share them with the backbone; all other operations read the
backbone's own weights.

Sizes never cross a cut: they are read again from a tensor that does. Nor do masks: what is made of
token ids and masks alone is made anew in each stage, and the mask crosses.

Shapes: ``B`` batch, ``T`` tokens.
"""

from __future__ import annotations

import logging
import operator
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import Dim
from torch.export.graph_signature import InputKind

from offramp.errors import BackboneCutError
from offramp.measure.cost import evaluation_mode
from offramp.model.graph import Graph, Mode
from offramp.model.inputs import parameter_names
from offramp.model.multi_exit import Features
from offramp.model.proof import logits_in, logits_of
from offramp.model.ragged import Ragged
from offramp.model.tracing import (
    NotTraceableError,
    require_names,
    sizes_kept,
    unharmed,
    what_stopped,
)
from offramp.model.whole_layers import WHOLE_LAYER, WholeLayers

_WHOLE = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.RMSNorm),
    *(nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
"""Modules that map one tensor to one tensor; their own class only, without hooks."""

_RANDOM_OR_COUNTING = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)

_ROOT = "backbone"

_SIZE = torch.ops.aten.sym_size.int

Call = tuple[str, str]
"""A run of a module: torch.export's key, and its path in the backbone."""


class Exported(Graph):
    """The graphs of a backbone, one a mode, that torch.export wrote down."""

    def __init__(self, backbone: nn.Module, inputs: Features) -> None:
        text = _text(backbone, inputs)
        layers = WholeLayers(backbone)
        modes = [
            ExportedMode(
                *_export(backbone, layers, inputs, is_training), text=text, padding=layers.padding
            )
            for is_training in (False, True)
        ]
        if modes[0].is_like(modes[1]):
            modes[1] = modes[0]
        self.num_read = 1 + len(modes[0].along)
        has_lengths = all(mode.has_any_length for mode in modes)
        self.ragged = text if has_lengths and _ignores_padding(backbone, inputs, text) else None
        self._set_modes(modes[0], modes[1])

    def is_narrow(self, position: int) -> bool:
        """Return True if only what an exit reads, and token ids, cross there."""
        mode = self._modes[0]
        crossing = mode.crossing(self._ends[position - 1][0])
        return sum(not _is_small_node(node) for node in crossing) == 1


def _text(backbone: nn.Module, inputs: Features) -> Ragged | None:
    """Find the padding of texts: in a mask, or by an id; None if the inputs are no texts."""
    if not _are_tokens(inputs):
        return None
    if len(inputs) > 1:
        names = parameter_names(backbone)
        is_named = "mask" in names[1] if len(names) > 1 else _is_mask(inputs[1])
        return Ragged(mask_index=1) if is_named else None
    pad_id = getattr(getattr(backbone, "config", None), "pad_token_id", None)
    return Ragged(mask_index=1, pad_id=pad_id) if isinstance(pad_id, int) else None


def _are_tokens(inputs: Features) -> bool:
    """Return True for ids of several tokens, and what else there is of each token."""
    shape = inputs[0].shape
    is_long = len(shape) == 2 and shape[1] > 1
    return is_long and all(_is_small(each) and each.shape == shape for each in inputs)


def _is_small(tensor: Tensor) -> bool:
    """Return True for token ids or marks, which are small to hand on."""
    return tensor.ndim <= 2 and not (tensor.is_floating_point() or tensor.is_complex())


def _is_mask(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == 1)).all()) and bool((tensor[:, 0] == 1).all())


def _ignores_padding(backbone: nn.Module, inputs: Features, text: Ragged | None) -> bool:
    """Return True if padding can be cut off, or added, without another answer."""
    if text is None:
        return False
    pads = [0 if text.pad_id is None else text.pad_id, *[0] * (len(inputs) - 1)]
    longer = tuple(
        torch.cat([tensor, torch.full_like(tensor[:, :2], pad)], 1)
        for tensor, pad in zip(inputs, pads, strict=True)
    )
    with evaluation_mode(backbone), torch.no_grad():
        try:
            expected, logits = logits_of(backbone, inputs), logits_of(backbone, longer)
        except Exception:  # such as texts longer than it takes
            return False
    return torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)


class _Logits(nn.Module):
    """A backbone that returns logits alone, all of whose inputs are of one batch."""

    def __init__(self, backbone: nn.Module, num_same: int) -> None:
        super().__init__()
        self.backbone = backbone
        self._num_same = num_same

    def forward(self, *inputs: Tensor) -> Tensor:
        for tensor in inputs[1:]:
            for axis in range(self._num_same):
                torch._check(tensor.shape[axis] == inputs[0].shape[axis])  # type: ignore[no-untyped-call]
        try:
            return logits_in(self.backbone(*inputs), self.backbone)
        except BackboneCutError as error:
            mode = "training" if self.training else "evaluation"
            raise NotTraceableError(
                f"in {mode} it returns more than logits: name their place with 'output'"
            ) from error


def _export(
    backbone: nn.Module, layers: WholeLayers, inputs: Features, is_training: bool
) -> tuple[fx.Graph, dict[str, Any]]:
    """Trace a backbone in one mode; it is left as it was."""
    repeats = -(-2 // len(inputs[0]))
    samples = tuple(t.repeat(repeats, *(1,) * (t.ndim - 1)) for t in inputs)
    failure: Exception | None = None
    is_fixed = False
    first = [(2, False)] if _are_tokens(inputs) else []
    for num_dynamic, with_int in (*first, (1, False), (1, True)):
        if with_int and not is_fixed:
            break
        sizes = dict.fromkeys(range(num_dynamic), Dim.AUTO)
        with evaluation_mode(backbone), torch.enable_grad(), unharmed(backbone), _quiet():
            backbone.train(is_training)
            try:
                with layers.standing_in(), sizes_kept(backbone, with_int=with_int):
                    program = torch.export.export(
                        _Logits(backbone, num_dynamic).train(is_training),
                        samples,
                        dynamic_shapes=(tuple(sizes for _ in samples),),
                        strict=False,
                    )
                is_fixed = _symbol(_input_shape(program)[0]) is None
                if not is_fixed:
                    return _graph_of(program, backbone, layers)
            except NotTraceableError:
                raise
            except Exception as error:  # whatever the backbone's own code raises
                failure = failure or error
    if failure is None:
        raise NotTraceableError("its code makes a number of the size of a batch")
    raise NotTraceableError(what_stopped(failure)) from failure


def _input_shape(program: Any) -> Any:
    """The shape of the first input, as it was traced."""
    specs = zip(program.graph.nodes, program.graph_signature.input_specs, strict=False)
    found = (node.meta["val"].shape for node, spec in specs if spec.kind is InputKind.USER_INPUT)
    return next(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the graphs that torch.export prints where it fails."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _graph_of(
    program: Any, backbone: nn.Module, layers: WholeLayers
) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph with the backbone's own weights and modules, and what it names."""
    graph, objects = fx.Graph(), dict[str, Any]()
    env: dict[fx.Node, Any] = {}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            env[node] = graph.node_copy(node)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            path = spec.target.removeprefix(f"{_ROOT}.")
            objects[path] = _find(backbone, path)
            env[node] = graph.create_node("get_attr", path)
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            env[node] = _constant(graph, objects, program.constants[spec.target])
        else:
            raise NotTraceableError("it calls an object of its own that is no module or tensor")
        env[node].meta = dict(node.meta)
    outputs = _inlined(graph, program.graph_module, env, objects, layers)
    graph.output(outputs[0])
    _fold_modules(graph, backbone, objects)
    require_names(objects)
    _read_what_is_written(graph)
    _make_of_sizes(graph)
    _look_into_stacks(graph)
    _drop_dead(graph, is_training=backbone.training)
    return graph, objects


def _find(backbone: nn.Module, path: str) -> Any:
    found: Any = backbone
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _constant(graph: fx.Graph, objects: dict[str, Any], value: Tensor) -> fx.Node:
    """A tensor that the backbone's code makes of numbers, named by what stands in it."""
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    shape = "x".join(map(str, value.shape))
    name = f"constant_{shape}_{str(value.dtype)[6:]}_{zlib.crc32(content):08x}"
    objects[name] = value.detach()
    return graph.create_node("get_attr", name)


def _inlined(
    graph: fx.Graph,
    module: fx.GraphModule,
    env: dict[fx.Node, Any],
    objects: dict[str, Any],
    layers: WholeLayers,
) -> Any:
    """Copy a graph's nodes, blocks under ``torch.no_grad`` included; return its output."""

    def look_up(node: fx.Node) -> Any:
        return env[node]

    nodes: Sequence[Any] = list(module.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return fx.map_arg(node.args[0], look_up)
        if node.op == "get_attr":
            found = _find(module, node.target)
            is_block = isinstance(found, fx.GraphModule)
            env[node] = found if is_block else _constant(graph, objects, found)
            if not is_block:
                env[node].meta = dict(node.meta)
        elif isinstance(node.target, HigherOrderOperator):
            env[node] = _block(graph, node, env, objects, layers)
        elif node.target is WHOLE_LAYER:
            env[node] = layers.put_back(graph, node, look_up, objects)
        elif node.target is operator.getitem and not isinstance(env[node.args[0]], fx.Node):
            env[node] = env[node.args[0]][node.args[1]]
        elif node.target in _ALIASES:
            env[node] = env[node.args[0]]
        elif node.target not in _ASSERTIONS and not _is_assertion(node.target):
            env[node] = graph.node_copy(node, look_up)
            if node.target is torch.ops.aten.view.default:
                # Other kernels, for other batches, lay tensors out otherwise than when traced.
                env[node].target = torch.ops.aten.reshape.default
    raise AssertionError


_ALIASES = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.detach_.default)
"""Operations that torch.export writes around constants."""

_ASSERTIONS = (torch.sym_constrain_range, torch.sym_constrain_range_for_size)


def _is_assertion(target: Any) -> bool:
    name = target._schema.name if isinstance(target, OpOverload) else ""
    return name.startswith(("aten::_assert", "aten::sym_constrain"))


def _block(
    graph: fx.Graph,
    node: Any,
    env: dict[fx.Node, Any],
    objects: dict[str, Any],
    layers: WholeLayers,
) -> tuple[Any, ...]:
    """The nodes of a block that switches gradients or autocast off, or is checkpointed."""
    name = node.target.name()
    numbers = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
    numbers["tag_activation_checkpoint"] = 0
    if name not in numbers or (name == "wrap_with_autocast" and node.args[2]):
        raise NotTraceableError(
            "it switches autocast on, which its pieces would not: take that out of its forward, "
            "and run the network under it"
            if name == "wrap_with_autocast"
            else "it runs a part of its code as a function of torch's, such as torch.cond"
        )
    at = numbers[name]
    block, *given = (env[a] if isinstance(a, fx.Node) else a for a in node.args[at:])
    inner = [n for n in block.graph.nodes if n.op == "placeholder"]
    outputs = _inlined(graph, block, dict(zip(inner, given, strict=True)), objects, layers)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    if name == "wrap_with_set_grad_enabled" and not node.args[0]:
        outputs = tuple(_detached(graph, each) for each in outputs)
    return tuple(outputs)


def _detached(graph: fx.Graph, node: Any) -> Any:
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return node
    detached = graph.call_function(torch.ops.aten.detach.default, (node,))
    detached.meta = dict(node.meta)
    return detached


def _calls(node: fx.Node) -> list[Call]:
    """The runs of the backbone's modules that a node is part of, from outside."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [(key, value[0]) for key, value in stack.items()]
    return [(k, p[len(_ROOT) + 1 :]) for k, p in paths if p.startswith(f"{_ROOT}.")]


def _fold_modules(graph: fx.Graph, backbone: nn.Module, objects: dict[str, Any]) -> None:
    """Put modules of torch's own back in the place of the operation that each did."""
    runs: dict[Call, list[fx.Node]] = {}
    for node in graph.nodes:
        calls = _calls(node)
        if calls and node.op == "call_function":
            runs.setdefault(calls[-1], []).append(node)
    for (_, path), nodes in runs.items():
        module = _find(backbone, path)
        if type(module) not in _WHOLE or "forward" in vars(module):
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        counts = [n for n in nodes if n.target is torch.ops.aten.add_.Tensor]  # batches seen
        rest = [n for n in nodes if n not in counts]
        given = [n for node in rest for n in node.all_input_nodes if n.op != "get_attr"]
        if len(rest) != 1 or len(given) != 1:
            continue
        with graph.inserting_before(rest[0]):
            call = graph.create_node("call_module", path, (given[0],))
        call.meta = dict(rest[0].meta)
        objects[path] = module
        rest[0].replace_all_uses_with(call)
        for node in (*rest, *counts):
            graph.erase_node(node)


def _read_what_is_written(graph: fx.Graph) -> None:
    """Read a buffer itself where the backbone reads what writing into it returned."""
    for node in graph.nodes:
        for buffer in _writes(node):
            if buffer.op == "get_attr" and _base(node) is buffer:
                node.replace_all_uses_with(buffer)


def _make_of_sizes(graph: fx.Graph) -> None:
    """Make zeros and ones of their sizes alone where they take type and device of a tensor."""
    makers = {
        torch.ops.aten.new_zeros.default: torch.ops.aten.zeros.default,
        torch.ops.aten.new_ones.default: torch.ops.aten.ones.default,
    }
    for node in [n for n in graph.nodes if n.target in makers]:
        value = node.meta["val"]
        options = {"dtype": value.dtype, "device": value.device}
        with graph.inserting_before(node):
            made = graph.call_function(makers[node.target], (node.args[1],), options)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _look_into_stacks(graph: fx.Graph) -> None:
    """Read a tensor itself where the backbone takes it out of a stack, as an LSTM's last state."""
    for node in graph.nodes:
        stack: Any = node.args[0] if node.target is torch.ops.aten.select.int else None
        is_stack = stack is not None and stack.target is torch.ops.aten.stack.default
        if is_stack and node.args[1] == 0 and len(stack.args) == 1:
            node.replace_all_uses_with(stack.args[0][node.args[2]])


def _drop_dead(graph: fx.Graph, *, is_training: bool) -> None:
    kinds = {"call_function", "get_attr"} | (set() if is_training else {"call_module"})
    for node in reversed(list(graph.nodes)):
        is_dead = not node.users and node.op in kinds
        if is_dead and not (_writes(node) or _is_random(node)):
            graph.erase_node(node)


def _arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """The arguments of an operator, each as its schema describes it and as it is."""
    if isinstance(node.target, OpOverload):
        for index, argument in enumerate(node.target._schema.arguments):
            if index < len(node.args) and not argument.kwarg_only:
                yield argument, node.args[index]
            elif argument.name in node.kwargs:
                yield argument, node.kwargs[argument.name]


def _writes(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator changes in place."""
    return [
        value
        for argument, value in _arguments(node)
        if argument.alias_info is not None and argument.alias_info.is_write
        if isinstance(value, fx.Node)
    ]


def _base(node: fx.Node) -> fx.Node:
    """The tensor that a view is of."""
    while isinstance(node.target, OpOverload) and node.target._schema.returns:
        returned = node.target._schema.returns[0].alias_info
        seen = [
            value
            for argument, value in _arguments(node)
            if returned is not None and argument.alias_info is not None
            if isinstance(value, fx.Node)
        ]
        if not seen:
            break
        node = seen[0]
    return node


def _is_random(node: fx.Node) -> bool:
    tags = node.target.tags if isinstance(node.target, OpOverload) else ()
    return torch.Tag.nondeterministic_seeded in tags


def _is_size(node: fx.Node) -> bool:
    return node.target is _SIZE


def _is_light_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and _is_small_node(node)


def _is_small_node(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and _is_small(value)


class ExportedMode(Mode):
    """The graph that torch.export traced in one mode."""

    def __init__(
        self,
        graph: fx.Graph,
        objects: dict[str, Any],
        *,
        text: Ragged | None,
        padding: fx.Node | None,
    ) -> None:
        mask = None if text is None else _mask(graph, text)
        nodes = list(graph.nodes)
        if mask is None and padding is not None and _is_known_early(padding, nodes, objects):
            mask = _mask_of(graph, padding)
            nodes = list(graph.nodes)
        inputs = [node for node in nodes if node.op == "placeholder"]
        self._batch = _symbol(inputs[0].meta["val"].shape[0])
        self._code = graph.python_code("self").src
        fed = _fed(nodes, objects)
        placed = fed - _light(nodes, fed, objects)
        self.has_any_length = bool(text) and _symbols(inputs[0])[1] is not None
        self._groups = _groups(nodes, fed)
        ends, repeated = _ends(nodes, placed)
        if mask is not None:
            placed.add(mask)
            self.along = (mask,)
        super().__init__(nodes, objects=objects, placed=placed, ends=ends, repeated=repeated)

    def is_like(self, other: ExportedMode) -> bool:
        """Return True if two modes do the same with the same parts."""
        return self._code == other._code and all(
            each is other.objects[name] or name.startswith("constant_")
            for name, each in self.objects.items()
        )

    def _why_not_across(self, crossing: Sequence[fx.Node], position: int) -> str | None:
        handed_on = [*crossing, *self.along]
        known = {size for node in handed_on for size in _symbols(node)}
        if any(made < position <= last and size not in known for size, made, last in self._sizes):
            return "a size crosses it that no tensor beside it has"
        return super()._why_not_across(crossing, position)

    def _is_light(self, node: fx.Node) -> bool:
        return _is_small_node(node) or node in self.along

    @cached_property
    def _sizes(self) -> list[tuple[Any, int, int]]:
        """Each size that is read: what it is, and where it is made and last read."""
        index = {node: i for i, node in enumerate(self._nodes)}
        last: dict[fx.Node, int] = {}
        for node in reversed(self._nodes):
            if node in self._placed or node.op == "output":
                last[node] = index[node]
            else:
                last[node] = max((last[user] for user in node.users), default=-1)
        return [
            (_symbol(node.meta["val"]), index[node.all_input_nodes[0]], last[node])
            for node in self._nodes
            if _is_size(node) and _symbol(node.meta["val"]) is not None
        ]

    def _sources(self, node: fx.Node) -> Sequence[fx.Node]:
        return () if _is_size(node) else node.all_input_nodes

    def _shapes(self, node: fx.Node) -> dict[int, torch.Size] | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None

        def size(dim: Any, batch: int) -> int:
            symbol = _symbol(dim)
            if symbol is None:
                return int(dim)
            return batch if symbol == self._batch else int(dim.node.hint or 0) + 1000

        return {b: torch.Size([size(dim, b) for dim in value.shape]) for b in (2, 3)}

    def _copied(
        self,
        node: fx.Node,
        graph: fx.Graph,
        copies: dict[fx.Node, fx.Node],
        copy: Callable[[fx.Node], fx.Node],
    ) -> fx.Node:
        if _is_size(node):
            symbol = _symbol(node.meta["val"])
            for other, tensor in copies.items():
                sizes = _symbols(other) if symbol is not None else []
                if symbol in sizes:
                    return graph.call_function(_SIZE, (tensor, sizes.index(symbol)))
        for member in self._groups.get(_base(node), ()):  # all that is written into it
            copies[member] = graph.node_copy(member, copy)
            _follow_device(copies[member], next(iter(copies.values())))
        if node in copies:
            return copies[node]
        copied: fx.Node = graph.node_copy(node, copy)
        _follow_device(copied, next(iter(copies.values())))
        return copied


def _mask(graph: fx.Graph, text: Ragged) -> fx.Node:
    """Find the node that is 0 on padding: an input, or one made of the ids."""
    inputs: list[fx.Node] = [node for node in graph.nodes if node.op == "placeholder"]
    if text.pad_id is None:
        return inputs[text.mask_index]
    with graph.inserting_after(inputs[0]):
        is_padding = graph.call_function(torch.ops.aten.eq.Scalar, (inputs[0], text.pad_id))
    is_padding.meta["val"] = inputs[0].meta["val"]
    return _mask_of(graph, is_padding)


def _mask_of(graph: fx.Graph, is_padding: fx.Node) -> fx.Node:
    with graph.inserting_after(is_padding):
        is_token = graph.call_function(torch.ops.aten.logical_not.default, (is_padding,))
    with graph.inserting_after(is_token):
        mask = graph.call_function(torch.ops.aten.to.dtype, (is_token, torch.int64))
    is_token.meta["val"] = mask.meta["val"] = is_padding.meta["val"]
    return mask


def _follow_device(node: fx.Node, given: fx.Node) -> None:
    """Make tensors where the features are, not where the example was."""
    if any(isinstance(a, torch.device) for a in (*node.args, *node.kwargs.values())):
        with node.graph.inserting_before(node):
            device = node.graph.call_function(getattr, (given, "device"))
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
        node.kwargs = {
            name: device if isinstance(a, torch.device) else a for name, a in node.kwargs.items()
        }


def _symbol(size: Any) -> Any:
    """The expression that a size stands for; None for a number."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return None if expression is None or expression.is_number else expression


def _symbols(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return [_symbol(size) for size in value.shape] if isinstance(value, Tensor) else []


def _fed(nodes: Sequence[fx.Node], objects: Mapping[str, Any]) -> set[fx.Node]:
    """Nodes that depend on the inputs' values, draw random numbers, or change what lasts."""
    fed = {
        node
        for node in nodes
        if node.op == "placeholder"
        or _is_random(node)
        or (node.op == "call_module" and isinstance(objects[str(node.target)], _RANDOM_OR_COUNTING))
    }
    written: set[fx.Node] = set()
    size = -1
    while size != len(fed):
        size = len(fed)
        for node in nodes:
            if _is_size(node) or node.op in ("output", "get_attr"):
                continue
            if _base(node) in written or any(s in fed for s in node.all_input_nodes):
                fed.add(node)
            for target in _writes(node):
                base = _base(target)
                if base.op == "get_attr":
                    fed.add(node)
                elif node in fed and base.op != "placeholder":
                    written.add(base)
    return fed


def _light(nodes: Sequence[fx.Node], fed: Set[fx.Node], objects: Mapping[str, Any]) -> set[fx.Node]:
    """Nodes made of token ids and masks alone, by operations that no weight takes part in."""
    light: set[fx.Node] = set()
    weighty: set[fx.Node] = set()
    written = {_base(target) for node in nodes for target in _writes(node)}
    for node in nodes:
        sources = node.all_input_nodes
        is_weight = node.op == "get_attr" and isinstance(objects[str(node.target)], nn.Parameter)
        if is_weight or (not _is_size(node) and any(source in weighty for source in sources)):
            weighty.add(node)
        if node not in fed or not isinstance(node.target, OpOverload) or _is_random(node):
            continue
        is_pointwise = torch.Tag.pointwise in node.target.tags
        if (
            isinstance(node.meta.get("val"), Tensor)
            and _base(node) not in written
            and all(s not in fed or s in light or _is_light_input(s) for s in sources)
            and (is_pointwise or node not in weighty)
        ):
            light.add(node)
    return light


def _is_known_early(node: fx.Node, nodes: Sequence[fx.Node], objects: Mapping[str, Any]) -> bool:
    """Return True for a small input, and what is made of such without weights."""
    return _is_light_input(node) or node in _light(nodes, _fed(nodes, objects), objects)


def _groups(nodes: Sequence[fx.Node], fed: Set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Tensors that are written to and made anew: all that is done to each, in order."""
    written = {_base(target) for node in nodes for target in _writes(node)}
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        base = _base(node)
        if base in written and base not in fed and base.op != "get_attr":
            groups.setdefault(base, []).append(node)
    return groups


def _ends(
    nodes: Sequence[fx.Node], placed: Set[fx.Node]
) -> tuple[dict[str, tuple[int, fx.Node | None]], set[str]]:
    """Find the end of each module's run, its outputs that are read later, and repeated runs."""
    runs: dict[Call, list[int]] = {}
    for index, node in enumerate(nodes):
        if node in placed:
            for call in _calls(node):
                runs.setdefault(call, []).append(index)
    ends: dict[str, tuple[int, fx.Node | None]] = {}
    repeated: set[str] = set()
    for (_, path), indexes in runs.items():
        inside = {nodes[i] for i in indexes}
        read = [
            n for n in inside if any(not (user in inside or _is_size(user)) for user in n.users)
        ]
        if path in ends:
            repeated.add(path)
        ends[path] = (indexes[-1] + 1, read[0] if len(read) == 1 else None)
    return ends, repeated
