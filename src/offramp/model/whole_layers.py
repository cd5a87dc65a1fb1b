"""Layers that stay whole while torch.export traces: attention and recurrent layers.

Without gradients, ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` run fused kernels,
whose last bits differ from those with gradients; and of a recurrent layer taken apart nobody can
tell the channels. So each stands in the trace as one operator, in whose place the layer itself is
put afterwards, called as the backbone calls it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree


@torch.library.custom_op(
    "offramp::whole_layer",
    mutates_args=(),
    schema="(Tensor[] tensors, SymInt[] sizes, int[] axes, int number) -> Tensor[]",
)
def _whole_layer(
    tensors: Sequence[Tensor], sizes: Sequence[int], axes: Sequence[int], number: int
) -> list[Tensor]:
    """Stand for a layer: outputs of so many axes each, whose sizes follow one another."""
    raise NotImplementedError


@_whole_layer.register_fake
def _(
    tensors: Sequence[Tensor], sizes: Sequence[int], axes: Sequence[int], number: int
) -> list[Tensor]:
    rest = iter(sizes)
    return [tensors[0].new_empty([next(rest) for _ in range(num)]) for num in axes]


WHOLE_LAYER = torch.ops.offramp.whole_layer.default

_TENSOR = object()

_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


class WholeLayers:
    """The layers of a backbone that stay whole; the layers of an encoder are called in turn.

    Attributes:
        padding: The node that is true on padding in the last graph; None if no layer is given one.
    """

    padding: fx.Node | None = None

    def __init__(self, backbone: nn.Module) -> None:
        self._layers: dict[str, tuple[nn.Module, nn.Module]] = {}
        self._encoders: list[nn.TransformerEncoder] = []
        self._stacks: list[tuple[nn.RNNBase, list[str]]] = []
        self._calls: list[tuple[str, list[Any], pytree.TreeSpec]] = []
        for path, module in backbone.named_modules():
            if any(f"{path}.".startswith(f"{other}.") for other in self._layers):
                continue
            if _runs(module, nn.TransformerEncoder) and all(map(_is_layer, module.layers)):
                self._encoders.append(module)
                for name, layer in module.layers.named_children():
                    whole = _encoder_of(module, layer)
                    self._layers[f"{path}.layers.{name}".lstrip(".")] = layer, whole
            elif any(_runs(module, kind) for kind in _RECURRENT) and module.num_layers > 1:
                paths = [f"{path}.layer_{i}".lstrip(".") for i in range(module.num_layers)]
                self._stacks.append((module, paths))
                for i, each in enumerate(paths):
                    layer = _recurrent_layer(module, i)
                    self._layers[each] = layer, layer
            elif _is_layer(module) or any(
                _runs(module, kind) for kind in (nn.MultiheadAttention, *_RECURRENT)
            ):
                self._layers[path] = module, module

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let each be one operator inside the block."""
        self._calls.clear()
        self.padding = None
        forwards: list[tuple[nn.Module, Callable[..., Any]]] = [
            (encoder, functools.partial(_in_turn, encoder)) for encoder in self._encoders
        ]
        for stack, paths in self._stacks:
            layers = [self._layers[path][0] for path in paths]
            forwards.append((stack, functools.partial(_one_by_one, stack, layers)))
        for path, (layer, whole) in self._layers.items():
            forwards.append((layer, functools.partial(self._call, path, type(whole).forward)))
        try:
            for module, forward in forwards:
                vars(module)["forward"] = forward
            yield
        finally:
            for module, _ in forwards:
                vars(module).pop("forward", None)

    def _call(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(forward).bind(None, *args, **kwargs).arguments
        given.pop("self")
        layer = self._layers[path][0]
        shapes = _shapes(layer, given)
        if shapes is None:
            return forward(layer, *args, **kwargs)
        flat, structure = pytree.tree_flatten(dict(given))
        tensors = [each for each in flat if isinstance(each, Tensor)]
        others = [_TENSOR if isinstance(each, Tensor) else each for each in flat]
        sizes = [size for shape in shapes for size in shape]
        first, *rest = WHOLE_LAYER(tensors, sizes, list(map(len, shapes)), len(self._calls))
        self._calls.append((path, others, structure))
        if isinstance(layer, nn.TransformerEncoderLayer):
            return first
        return first, tuple(rest) if len(rest) > 1 else rest[0] if rest else None

    def put_back(
        self,
        graph: fx.Graph,
        node: Any,
        look_up: Callable[[Any], Any],
        objects: dict[str, Any],
    ) -> list[fx.Node]:
        """Write the layer of an operator's node into a graph; return its outputs."""
        tensors, *_, number = node.args
        path, others, structure = self._calls[number]
        rest = iter([look_up(tensor) for tensor in tensors])
        flat = [next(rest) if each is _TENSOR else each for each in others]
        given = pytree.tree_unflatten(flat, structure)
        call = graph.create_node("call_module", path, (), given)
        padding = given.get("src_key_padding_mask", given.get("key_padding_mask"))
        if isinstance(padding, fx.Node) and padding.meta["val"].dtype == torch.bool:
            self.padding = self.padding or padding
        layer, objects[path] = self._layers[path]
        values = node.meta["val"]
        call.meta = {**node.meta, "val": values[0]}
        if isinstance(layer, nn.TransformerEncoderLayer):
            return [call]
        call.meta["val"] = None

        def part(whole: fx.Node, index: int, value: Tensor | None) -> fx.Node:
            taken = graph.call_function(operator.getitem, (whole, index))
            taken.meta = {**node.meta, "val": value}
            return taken

        if len(values) < 3:
            return [part(call, i, value) for i, value in enumerate(values)]
        states = part(call, 1, None)
        return [part(call, 0, values[0]), *(part(states, i, v) for i, v in enumerate(values[1:]))]


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return True if a module does what its class of torch's own does, and nothing else."""
    is_torchs = type(module).forward is kind.forward and "forward" not in vars(module)
    return is_torchs and not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def _is_layer(module: nn.Module) -> bool:
    return _runs(module, nn.TransformerEncoderLayer)


def _encoder_of(encoder: nn.TransformerEncoder, layer: nn.Module) -> nn.Module:
    """An encoder of one layer, which packs padded texts as the whole one does."""
    one = copy.copy(encoder)
    vars(one)["_modules"] = {"layers": nn.ModuleList([layer]), "norm": None}
    one.num_layers = 1
    return one


def _in_turn(
    encoder: Any,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    for layer in encoder.layers:
        src = layer(src, mask, src_key_padding_mask, is_causal)
    return src if encoder.norm is None else encoder.norm(src)


def _recurrent_layer(stack: nn.RNNBase, index: int) -> nn.RNNBase:
    """One layer of several, which shares their weights."""
    directions = 2 if stack.bidirectional else 1
    width = directions * (stack.proj_size or stack.hidden_size)
    options: dict[str, Any] = {"bias": stack.bias, "batch_first": stack.batch_first}
    if isinstance(stack, nn.LSTM):
        options["proj_size"] = stack.proj_size
    elif isinstance(stack, nn.RNN):
        options["nonlinearity"] = stack.nonlinearity
    kind: type[Any] = type(stack)
    layer: nn.RNNBase = kind(
        width if index else stack.input_size,
        stack.hidden_size,
        bidirectional=stack.bidirectional,
        device="meta",
        **options,
    )
    for direction in range(directions):
        theirs = stack._all_weights[index * directions + direction]
        for name, their in zip(layer._all_weights[direction], theirs, strict=True):
            setattr(layer, name, getattr(stack, their))
    return layer.train(stack.training)


def _one_by_one(
    stack: nn.RNNBase, layers: Sequence[nn.Module], x: Any, hx: Any = None, **others: Any
) -> Any:
    """Run a recurrent module's layers, each as an operator, with dropout between them."""
    if not isinstance(x, Tensor):
        return type(stack).forward(stack, x, hx, **others)
    num = 2 if stack.bidirectional else 1
    states: list[tuple[Tensor, ...]] = []
    for index, layer in enumerate(layers):
        if index and stack.dropout:
            x = F.dropout(x, stack.dropout, stack.training)
        here = slice(index * num, (index + 1) * num)
        first = None if hx is None else pytree.tree_map(lambda state, rows=here: state[rows], hx)
        x, state = layer(x, first)
        states.append(state if isinstance(state, tuple) else (state,))
    each = zip(*states, strict=True)
    stacked = [torch.stack([s[i] for s in of for i in range(num)]) for of in each]
    return x, tuple(stacked) if len(stacked) > 1 else stacked[0]


def _shapes(layer: nn.Module, given: dict[str, Any]) -> list[list[int]] | None:
    """The shapes of a layer's outputs; None for packed texts."""
    if isinstance(layer, nn.TransformerEncoderLayer):
        return [list(given["src"].shape)]
    if isinstance(layer, nn.MultiheadAttention):
        query, key = list(given["query"].shape), list(given["key"].shape)
        batch = [query[0 if layer.batch_first else 1]] if len(query) == 3 else []
        axis = 1 if layer.batch_first and batch else 0
        heads = [] if given.get("average_attn_weights", True) else [layer.num_heads]
        weights = [*batch, *heads, query[axis], key[axis]]
        return [query, weights] if given.get("need_weights", True) else [query]
    assert isinstance(layer, nn.RNNBase)
    if not isinstance(given["input"], Tensor):
        return None
    *shape, _ = given["input"].shape
    batch = [shape[0 if layer.batch_first else 1]] if len(shape) == 2 else []
    directions = 2 if layer.bidirectional else 1
    width = layer.proj_size or layer.hidden_size
    state = [directions * layer.num_layers, *batch]
    states = [[*state, width], [*state, layer.hidden_size]]
    return [[*shape, directions * width], *states[: 2 if layer.mode == "LSTM" else 1]]
