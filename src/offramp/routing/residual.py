"""Residual networks taken apart into stem, blocks and head, and the ways around their blocks.

Blocks are found in the graph of a backbone, whatever its modules are called. Where one tensor
alone goes on, the graph has a joint; what lies between two joints is a residual block if it ends
in a sum of which one side, the shortcut, is the first joint itself or a lighter way from it.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from offramp.errors import BackboneCutError, reason
from offramp.model.graph import TracedStage, _function
from offramp.model.tracing import NotTraceableError, Tracer, trace
from offramp.routing.own import own_parts


class ResidualParts(NamedTuple):
    """A residual network in order.

    Attributes:
        stem: In front of the first block.
        blocks: The residual blocks, each with what stands between it and the one before.
        head: Behind the last.
    """

    stem: nn.Module
    blocks: tuple[nn.Module, ...]
    head: nn.Module


class ResidualBlock(TracedStage):
    """A slice of a traced backbone that ends in a residual block, and the way around that."""

    def __init__(
        self, objects: dict[str, Any], runs: Sequence[fx.Graph], ways: Sequence[fx.Graph]
    ) -> None:
        self._ways = tuple(ways)
        super().__init__(objects, runs)

    def skip(self, x: Tensor) -> Tensor:
        """Go around the block: everything but what it adds to its shortcut."""
        y: Tensor = self._skips[self.training](self, x)
        return y

    def _compile(self) -> None:
        super()._compile()
        self._skips = tuple(_function(graph) for graph in self._ways)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["_skips"]
        return state


def take_apart(backbone: nn.Module) -> ResidualParts:
    """Find stem, blocks and head."""
    own = own_parts(backbone)
    if own is not None:
        parts = list(own.stage) if type(own.stage) is nn.Sequential else []
        start = next((i for i, part in enumerate(parts) if _is_block(part)), len(parts))
        if parts and all(_is_block(part) for part in parts[start:]):
            return ResidualParts(nn.Sequential(*parts[:start]), tuple(parts[start:]), own.head)
    try:
        modes = [_Mode(backbone, is_training=is_training) for is_training in (False, True)]
    except NotTraceableError as error:
        raise BackboneCutError(
            f"{type(backbone).__name__} cannot be given gates: its forward cannot be followed "
            f"({reason(error)}). {BUILD}"
        ) from error
    counts = [len(mode.blocks) for mode in modes]
    if counts[0] != counts[1]:
        raise BackboneCutError(
            f"{type(backbone).__name__} cannot be given gates: it has {counts[0]} residual blocks "
            f"in evaluation and {counts[1]} in training. {BUILD}"
        )
    if not counts[0]:
        raise BackboneCutError(
            "Expected a residual network: blocks whose input, or a lighter projection of it, is "
            f"added to their output, one after the other. Got {type(backbone).__name__}, which has "
            f"none. {BUILD}"
        )
    objects = {name: each for mode in modes for name, each in mode.objects.items()}
    stem, *blocks, head = zip(*(mode.slices() for mode in modes), strict=True)
    ways = zip(*(mode.ways() for mode in modes), strict=True)
    return ResidualParts(
        TracedStage(objects, stem),
        tuple(ResidualBlock(objects, *each) for each in zip(blocks, ways, strict=True)),
        TracedStage(objects, head),
    )


BUILD = "Build a SkipNetwork from its stem, blocks and head."


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A residual block in a graph.

    Attributes:
        start: The joint that its shortcut and what it adds are made of.
        total: Their sum.
        shortcut: The side of the sum that stays.
        end: The activation behind the sum, or the sum itself.
    """

    start: fx.Node
    total: fx.Node
    shortcut: fx.Node
    end: fx.Node


class _Mode:
    """The graph of a backbone in one mode, and its residual blocks."""

    def __init__(self, backbone: nn.Module, *, is_training: bool) -> None:
        tracer = _follow(_Logits(backbone), is_training=is_training)
        self.objects = {_path(name): each for name, each in tracer.objects.items()}
        self._nodes = list(tracer.graph.nodes)
        self._final = self._nodes[-1].args[0]
        if not isinstance(self._final, fx.Node):
            raise NotTraceableError("it returns something else than a tensor of logits")
        self._fed: set[fx.Node] = set()
        for node in self._nodes[:-1]:
            if node.op == "placeholder" or not self._fed.isdisjoint(node.all_input_nodes):
                self._fed.add(node)
        joints = _joints(self._nodes, self._fed)
        self.blocks: list[_Found] = []
        for start, total in pairwise(joints):
            shortcut = self._shortcut(start, total)
            if shortcut is not None:
                after = [n for n in total.users if n in joints and self._activation(n)]
                end = after[0] if len(after) == len(total.users) == 1 else total
                found = _Found(start=start, total=total, shortcut=shortcut, end=end)
                self.blocks.append(found)

    def slices(self) -> list[fx.Graph]:
        """The stem, each block, and the tail behind the last one.

        What stands between two blocks belongs to the second.
        """
        ends = [block.start for block in self.blocks[:1]] + [block.end for block in self.blocks]
        between = pairwise((self._nodes[0], *ends, self._final))
        return [self._slice(given, returned) for given, returned in between]

    def ways(self) -> list[fx.Graph]:
        """The way around each block, from where its slice begins."""
        ways = []
        before: _Found | None = None
        for block in self.blocks:
            given = block.start if before is None else before.end
            kind = self._activation(block.end)
            is_done = (
                kind in _IDEMPOTENT
                and block.shortcut is given
                and before is not None
                and self._activation(before.end) == kind
            )
            if is_done:  # the input has been through this activation already
                ways.append(self._graph(given, given, (), {}))
            else:
                ways.append(self._way(given, block))
            before = block
        return ways

    def _shortcut(self, start: fx.Node, total: fx.Node) -> fx.Node | None:
        """The side of a sum that is its shortcut; None if this is no residual block."""
        if total.target not in _SUMS or len(total.args) != 2 or total.kwargs:
            return None
        sides = [side for side in total.args if isinstance(side, fx.Node) and side in self._fed]
        if len(sides) != 2:
            return None
        weights = [self._num_weights(side, start) for side in sides]
        if weights[0] == weights[1]:
            return None
        return sides[weights[1] < weights[0]]

    def _num_weights(self, node: fx.Node, start: fx.Node) -> int:
        """Count the steps from a joint to a node that hold a matrix or a convolution."""
        seen: set[fx.Node] = set()
        todo = [node]
        while todo:
            each = todo.pop()
            if each is not start and each not in seen:
                seen.add(each)
                todo += each.all_input_nodes
        held = (self.objects.get(_path(each.target)) for each in seen if each.op in _HOLDING)
        return sum(
            isinstance(each, Tensor) and each.ndim > 1
            if not isinstance(each, nn.Module)
            else any(p.ndim > 1 for p in each.parameters())
            for each in held
        )

    def _activation(self, node: fx.Node) -> str | None:
        """The name of an activation without weights; None for another step."""
        if node.op == "call_module":
            module = self.objects[_path(node.target)]
            name = type(module).__name__.lower()
            is_one = type(module).__module__ == "torch.nn.modules.activation"
            return name if is_one and next(module.parameters(), None) is None else None
        name = str(getattr(node.target, "__name__", node.target)).rstrip("_")
        return name if name in _ACTIVATIONS else None

    def _slice(self, given: fx.Node, returned: fx.Node) -> fx.Graph:
        """The steps behind one joint, to another."""
        start, end = self._nodes.index(given), self._nodes.index(returned)
        steps = [node for node in self._nodes[start + 1 : end + 1] if node in self._fed]
        return self._graph(given, returned, steps, {})

    def _way(self, given: fx.Node, block: _Found) -> fx.Graph:
        """The steps around a block: its sum is replaced by the shortcut."""
        instead = {block.total: block.shortcut}
        start, end = (instead.get(node, node) for node in (given, block.end))
        steps: set[fx.Node] = set()
        todo = [end]
        while todo:
            node = todo.pop()
            if node is not start and node in self._fed and node not in steps:
                steps.add(node)
                todo += [instead.get(each, each) for each in node.all_input_nodes]
        return self._graph(given, end, [n for n in self._nodes if n in steps], instead)

    def _graph(
        self,
        given: fx.Node,
        returned: fx.Node,
        steps: Sequence[fx.Node],
        instead: dict[fx.Node, fx.Node],
    ) -> fx.Graph:
        graph = fx.Graph()
        copies = {given: graph.placeholder("x")}
        totals = {block.total for block in self.blocks}

        def copied(node: fx.Node) -> fx.Node:
            node = instead.get(node, node)
            if node not in copies:
                copy = copies[node] = graph.node_copy(node, copied)
                copy.meta = {}  # where it came from: classes that may not be pickled
                if node.op in _HOLDING:
                    copy.target = _path(node.target)
                if node in totals:  # in place it would write on the block's input
                    copy.target = _WITHOUT_WRITING.get(node.target, node.target)
            return copies[node]

        for node in steps:
            copied(node)
        graph.output(copied(returned))
        return graph


def _joints(nodes: Sequence[fx.Node], fed: set[fx.Node]) -> list[fx.Node]:
    """Nodes behind which nothing is read that was made before them."""
    index = {node: i for i, node in enumerate(nodes)}
    last_use = {n: max((index[user] for user in n.users), default=-1) for n in nodes}
    joints, is_open = [], set[fx.Node]()
    for i, node in enumerate(nodes):
        if node in fed:
            is_open.add(node)
            is_open = {each for each in is_open if last_use[each] > i}
            if is_open == {node}:
                joints.append(node)
    return joints


class _Logits(nn.Module):
    """A backbone that returns its logits alone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Any:
        output = self.backbone(x)
        return output if isinstance(output, fx.Proxy | Tensor) else getattr(output, "logits", None)


def _path(target: Any) -> Any:
    """A path in the backbone, whose root is :class:`_Logits` in a graph."""
    return target.removeprefix("backbone.") if isinstance(target, str) else target


def _follow(root: nn.Module, *, is_training: bool) -> Tracer:
    """Trace a backbone, in one mode; modules whose code cannot be followed stay whole."""
    whole: set[int] = set()
    while True:
        try:
            return trace(
                root,
                num_inputs=1,
                is_training=is_training,
                is_whole=lambda module: id(module) in whole or _is_one_step(module),
            )
        except NotTraceableError as error:
            module = _module_of(error, root)
            if module is None or id(module) in whole:
                raise
            whole.add(id(module))


def _is_one_step(module: nn.Module) -> bool:
    """Keep torch's own modules, and those that read the training mode, whole.

    The mode that a decorator around ``forward`` reads, as transformers' do, says nothing of it.
    """
    is_torchs = fx.Tracer().is_leaf_module(module, "")
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    asks_for_mode = code is not None and "training" in code.co_names
    return is_torchs or asks_for_mode or next(module.children(), None) is None


def _module_of(error: BaseException, root: nn.Module) -> nn.Module | None:
    """The innermost module below the backbone whose code raised an error."""
    below = {id(module) for child in root.children() for module in child.modules()}
    below -= {id(child) for child in root.children()}
    found = None
    trail: TracebackType | None = (error.__cause__ or error).__traceback__
    while trail is not None:
        owner = trail.tb_frame.f_locals.get("self")
        if id(owner) in below:
            found = owner
        trail = trail.tb_next
    return found


_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_WITHOUT_WRITING: dict[Any, Any] = {operator.iadd: operator.add, "add_": "add"}
_HOLDING = ("call_module", "get_attr")
_IDEMPOTENT = ("relu", "relu6")
_ACTIVATIONS = (*_IDEMPOTENT, "gelu", "silu", "hardswish", "leaky_relu", "elu", "mish", "tanh")


def skip_block(block: nn.Module, x: Tensor) -> Tensor:
    """Go around a residual block, as if what it adds were zero."""
    if isinstance(block, ResidualBlock):
        return block.skip(x)
    shortcut = _shortcut(block)
    if isinstance(shortcut, nn.Identity):
        return x
    y: Tensor = _last_activation(block)(shortcut(x))
    return y


def _is_block(module: nn.Module) -> bool:
    """Return True if a module is a residual block with a shortcut of its own, as ours have."""
    return hasattr(module, "shortcut") or hasattr(module, "downsample")


def _shortcut(block: nn.Module) -> nn.Module:
    shortcut = getattr(block, "shortcut", None) or getattr(block, "downsample", None)
    return shortcut if isinstance(shortcut, nn.Module) else nn.Identity()


def _last_activation(block: nn.Module) -> nn.Module:
    names = ("activation", "act3", "act2", "relu")
    activation: nn.Module = next(getattr(block, name) for name in names if hasattr(block, name))
    return activation


@contextmanager
def adding_nothing(block: nn.Module) -> Iterator[None]:
    """Set the weights of what a block adds to its shortcut to zero inside the block."""
    around = {id(p) for p in _shortcut(block).parameters()}
    weights = [p.data for p in block.parameters() if id(p) not in around]
    saved = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            weight.zero_()
        yield
    finally:
        for weight, value in zip(weights, saved, strict=True):
            weight.copy_(value)
