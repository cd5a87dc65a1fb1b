"""Tracing a backbone with torch.fx, in one mode, and noticing what a trace would lose.

A trace runs the backbone's own code on stand-ins for tensors. What that code decides by values
cannot be traced; what it does beside the stand-ins (random numbers, buffers, gradients switched
off) would be done once, now, and never again, so that it is refused too.
"""

from __future__ import annotations

import keyword
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from offramp.measure.cost import evaluation_mode
from offramp.model.inputs import parameter_names


class NotTraceableError(Exception):
    """torch.fx cannot follow this backbone; for :func:`~offramp.add_exits` to catch."""


class Tracer(fx.Tracer):
    """Notes after which node each module's run ends, and what it returns.

    Attributes:
        ends: By path of a module, the last node of its run and its output.
        repeated: Paths of modules that run more than once.
        objects: Every module and tensor that the graph names, by its target.
    """

    def __init__(self, is_whole: Callable[[nn.Module], bool], names: Sequence[str]) -> None:
        super().__init__()
        self._names = names
        self.ends: dict[str, tuple[fx.Node, Any]] = {}
        self.repeated: set[str] = set()
        self.objects: dict[str, Any] = {}
        self._is_whole = is_whole
        self._context = _context()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Give the inputs by position; all others keep their defaults."""
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in self._names]
        return root_fn, [self.root, *inputs]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True if a module stays one step."""
        return isinstance(m, torch.jit.ScriptModule) or self._is_whole(m)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Write a step down, unless it runs in a context that a trace does not keep."""
        if _context() != self._context:
            raise NotTraceableError(
                "it switches gradients or autocast on its way, which its pieces would not"
            )
        return super().create_node(*args, **kwargs)

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


def stays_whole(module: nn.Module) -> bool:
    """Keep torch's own modules, and those that read the training mode, as one step."""
    is_torchs = fx.Tracer().is_leaf_module(module, "")
    return is_torchs or not any(True for _ in module.children()) or _asks_for_mode(module)


def _asks_for_mode(module: nn.Module) -> bool:
    """Return True if its forward reads ``self.training``: kept whole, it uses its own mode."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


def trace(
    backbone: nn.Module,
    *,
    num_inputs: int,
    is_training: bool,
    is_whole: Callable[[nn.Module], bool] = stays_whole,
) -> Tracer:
    """Trace a backbone in one mode; it is left as it was."""
    known = parameter_names(backbone)
    names = [known[i] if i < len(known) else f"input_{i}" for i in range(num_inputs)]
    with (
        evaluation_mode(backbone),
        torch.enable_grad(),
        unharmed(backbone),
        sizes_kept(backbone),
    ):
        backbone.train(is_training)
        tracer = Tracer(is_whole, names)
        try:
            graph = tracer.trace(backbone)
            tracer.objects = {
                node.target: _find(backbone, node.target)
                for node in graph.nodes
                if node.op in ("call_module", "get_attr")
            }
        except NotTraceableError:
            raise
        except Exception as error:  # whatever the backbone's own code raises on a stand-in
            raise NotTraceableError(what_stopped(error)) from error
    require_names(tracer.objects)
    if not is_training and getattr(backbone, "picks_output", False):
        _drop_unread(tracer)
    return tracer


def _drop_unread(tracer: Tracer) -> None:
    """Leave out layers whose output nobody reads, such as heads beside the one that counts."""
    nodes = list(tracer.graph.nodes)
    for node in reversed(nodes):
        target = tracer.objects.get(str(node.target), node.target)
        author = getattr(
            type(target) if isinstance(target, nn.Module) else target, "__module__", ""
        )
        name = getattr(target, "__name__", str(node.target))
        is_pure = node.op == "call_method" or (author or "").startswith(("torch", "_operator"))
        if node.users or node.op in ("placeholder", "output") or not is_pure:
            continue
        if not name.endswith("_") and not getattr(target, "inplace", node.kwargs.get("inplace")):
            tracer.graph.erase_node(node)
    left = set(tracer.graph.nodes)
    tracer.ends = {path: end for path, end in tracer.ends.items() if end[0] in left}


def require_names(paths: Iterable[str]) -> None:
    """Refuse what a graph cannot name: torch.fx writes code with these names."""
    for path in paths:
        word = next(filter(keyword.iskeyword, path.split(".")), None)
        if word is not None:
            raise NotTraceableError(f"{path!r} is named by a word of Python's, {word!r}: rename it")


def require_calls_in_order(backbone: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Refuse a backbone that does more than to call some modules, one after the other."""
    known = {id(module) for module in modules}
    for is_training in (False, True):
        tracer = trace(
            backbone, num_inputs=1, is_training=is_training, is_whole=lambda m: id(m) in known
        )
        first, *calls, output = tracer.graph.nodes
        given = [first, *calls]
        is_chain = (
            first.op == "placeholder"
            and [tracer.objects.get(node.target) for node in calls] == list(modules)
            and all(node.op == "call_module" and not node.kwargs for node in calls)
            and all(n.args == (last,) for n, last in zip([*calls, output], given, strict=True))
        )
        if not is_chain:
            raise NotTraceableError("it does more than to call its children one after the other")


def _find(root: nn.Module, target: str) -> Any:
    found: Any = root
    for name in target.split("."):
        found = getattr(found, name)
    return found


def _context() -> tuple[bool, ...]:
    """The state that a block such as ``torch.no_grad()`` switches; a graph does not keep it."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


@contextmanager
def unharmed(backbone: nn.Module) -> Iterator[None]:
    """Put attributes back that the traced code sets; refuse what it did once and for all."""
    modules = [m for m in backbone.modules() if not isinstance(m, torch.jit.ScriptModule)]
    tables = [t for m in modules for t in (vars(m), m._parameters, m._buffers, m._modules)]
    saved = [(table, dict(table)) for table in tables]
    buffers = [(name, b, b._version, b.clone()) for name, b in backbone.named_buffers()]
    numbers = _random_states()
    try:
        yield
        if not _are_equal(numbers, _random_states()):
            raise NotTraceableError(
                "it draws random numbers outside its modules, which a trace would draw only once"
            )
        for name, buffer, version, _ in buffers:
            if buffer._version != version:
                raise NotTraceableError(
                    f"it changes its buffer {name!r} outside its modules, which a trace would do "
                    "only once"
                )
    finally:
        for table, before in saved:
            for key in [key for key in table if key not in before]:
                del table[key]
            table.update(before)
        for _, buffer, version, value in buffers:
            if buffer._version != version:
                buffer.data.copy_(value)
        torch.set_rng_state(numbers[0])
        random.setstate(numbers[1])
        np.random.set_state(numbers[2])


@contextmanager
def sizes_kept(backbone: nn.Module, *, with_int: bool = False) -> Iterator[None]:
    """Let ``len(x)`` in a backbone's own code be a size that is traced, not a number.

    With ``with_int``, so are ``int(size)`` and ``size / 4`` of a size that 4 divides.
    """
    functions = (f for m in backbone.modules() for c in type(m).__mro__ for f in vars(c).values())
    found = (getattr(f, "__globals__", None) for f in functions)
    spaces = {id(g): g for g in found if g and not str(g.get("__name__")).startswith("torch.")}
    wanted = {"len": _length, "int": _WholeNumber} if with_int else {"len": _length}
    missing = [(space, wanted.keys() - space.keys()) for space in spaces.values()]
    sizes: Any = torch.SymInt
    divided = sizes.__truediv__

    def quotient(size: Any, divisor: Any) -> Any:
        is_whole = isinstance(divisor, int | float) and divisor > 0 and divisor == int(divisor)
        is_exact = is_whole and (size.node.expr / int(divisor)).is_integer
        return size // int(divisor) if is_exact else divided(size, divisor)

    try:
        if with_int:
            sizes.__truediv__ = quotient
        for space, names in missing:
            space.update({name: wanted[name] for name in names})
        yield
    finally:
        sizes.__truediv__ = divided
        for space, names in missing:
            for name in names:
                space.pop(name, None)


class _Whole(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, int)

    def __call__(cls, *values: Any) -> Any:
        is_size = values and isinstance(values[0], torch.SymInt | torch.SymFloat)
        make: Any = torch.sym_int if is_size else int
        return make(*values)


class _WholeNumber(int, metaclass=_Whole):
    """Stands in for ``int`` in a backbone's code."""


def _length(value: Any) -> Any:
    is_tensor = isinstance(value, fx.Proxy) or (isinstance(value, Tensor) and value.ndim)
    return value.shape[0] if is_tensor else len(value)


def _random_states() -> tuple[Tensor, Any, Any]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _are_equal(before: tuple[Tensor, Any, Any], after: tuple[Tensor, Any, Any]) -> bool:
    return (
        torch.equal(before[0], after[0])
        and before[1] == after[1]
        and all(map(np.array_equal, before[2], after[2]))
    )


def what_stopped(error: Exception) -> str:
    """The line of the backbone's own code that torch.fx could not follow."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(ours)]
    if not theirs or not theirs[-1].line:
        return "its code asks a tensor for values or sizes, or takes one apart"
    frame = theirs[-1]
    return f"line {frame.lineno} of {Path(frame.filename).name}, `{frame.line}`"
