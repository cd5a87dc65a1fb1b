"""Layers that stay whole while torch.export traces: attention, which has kernels of its own.

Without gradients, ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` run fused kernels,
whose last bits differ from those with gradients. So each stands in the trace as one operator, in
whose place the layer itself is put afterwards, called as the backbone calls it.

Shapes: ``B`` batch, ``H`` heads, ``T`` tokens, ``S`` tokens attended to.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree


@torch.library.custom_op(
    "offramp::whole_layer",
    mutates_args=(),
    schema="(Tensor[] tensors, SymInt[] weights, int number) -> Tensor[]",
)
def _whole_layer(tensors: Sequence[Tensor], weights: Sequence[int], number: int) -> list[Tensor]:
    """Stand for a layer: an output like the first tensor, and weights of attention of a shape."""
    raise NotImplementedError


@_whole_layer.register_fake
def _(tensors: Sequence[Tensor], weights: Sequence[int], number: int) -> list[Tensor]:
    output = [torch.empty_like(tensors[0])]
    return [*output, tensors[0].new_empty(list(weights))] if weights else output


WHOLE_LAYER = torch.ops.offramp.whole_layer.default

_TENSOR = object()


class WholeLayers:
    """The layers of a backbone that stay whole; the layers of an encoder are called in turn.

    Attributes:
        padding: The node that is true on padding in the last graph; None if no layer is given one.
    """

    padding: fx.Node | None = None

    def __init__(self, backbone: nn.Module) -> None:
        self._layers: dict[str, tuple[nn.Module, nn.Module]] = {}
        self._encoders: list[nn.TransformerEncoder] = []
        self._calls: list[tuple[str, list[Any], pytree.TreeSpec]] = []
        for path, module in backbone.named_modules():
            if any(f"{path}.".startswith(f"{other}.") for other in self._layers):
                continue
            if _runs(module, nn.TransformerEncoder) and all(map(_is_layer, module.layers)):
                self._encoders.append(module)
                for name, layer in module.layers.named_children():
                    whole = _encoder_of(module, layer)
                    self._layers[f"{path}.layers.{name}".lstrip(".")] = layer, whole
            elif _is_layer(module) or _runs(module, nn.MultiheadAttention):
                self._layers[path] = module, module

    def stand_in(self) -> None:
        """Let each be one operator from now on, until its attributes are put back."""
        self._calls.clear()
        self.padding = None
        for encoder in self._encoders:
            vars(encoder)["forward"] = functools.partial(_in_turn, encoder)
        for path, (layer, whole) in self._layers.items():
            vars(layer)["forward"] = functools.partial(self._call, path, type(whole).forward)

    def _call(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(forward).bind(None, *args, **kwargs).arguments
        given.pop("self")
        flat, structure = pytree.tree_flatten(dict(given))
        tensors = [each for each in flat if isinstance(each, Tensor)]
        others = [_TENSOR if isinstance(each, Tensor) else each for each in flat]
        layer = self._layers[path][0]
        is_attention = isinstance(layer, nn.MultiheadAttention)
        weights = _shape_of_weights(layer, given) if is_attention else []
        outputs = WHOLE_LAYER(tensors, weights, len(self._calls))
        self._calls.append((path, others, structure))
        return (outputs[0], outputs[1] if weights else None) if is_attention else outputs[0]

    def put_back(
        self,
        graph: fx.Graph,
        node: fx.Node,
        look_up: Callable[[Any], Any],
        objects: dict[str, Any],
    ) -> list[fx.Node]:
        """Write the layer of an operator's node into a graph; return its outputs."""
        tensors, _, number = node.args
        path, others, structure = self._calls[number]  # type: ignore[index]
        rest: Any = fx.map_arg(tensors, look_up)
        rest = iter(rest)
        flat = [next(rest) if each is _TENSOR else each for each in others]
        given = pytree.tree_unflatten(flat, structure)
        call = graph.create_node("call_module", path, (), given)
        padding = given.get("src_key_padding_mask", given.get("key_padding_mask"))
        if isinstance(padding, fx.Node) and padding.meta["val"].dtype == torch.bool:
            self.padding = self.padding or padding
        layer, objects[path] = self._layers[path]
        values = node.meta["val"]
        call.meta = {**node.meta, "val": values[0]}
        if not isinstance(layer, nn.MultiheadAttention):
            return [call]
        outputs = [graph.call_function(operator.getitem, (call, i)) for i in range(len(values))]
        for output, value in zip(outputs, values, strict=True):
            output.meta = {**node.meta, "val": value}
        call.meta["val"] = None
        return outputs


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


def _shape_of_weights(attention: nn.Module, given: dict[str, Any]) -> list[int]:
    """The shape of the weights that attention returns; empty if it returns none."""
    if not given.get("need_weights", True):
        return []
    query, key = given["query"].shape, given["key"].shape
    is_first = bool(attention.batch_first)
    batch = [query[0 if is_first else 1]] if len(query) == 3 else []
    axis = 1 if is_first and batch else 0
    heads: list[Any] = [] if given.get("average_attn_weights", True) else [attention.num_heads]
    return [*batch, *heads, query[axis], key[axis]]
