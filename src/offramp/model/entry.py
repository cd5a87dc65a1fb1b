"""The way into a backbone and out of it: tensors in order go in, logits come out.

A backbone may want its inputs by name, with gaps between them or in a dict, and may return its
logits among other things. Its entry is the same backbone, with the same parts under the same paths,
whose ``forward`` is called by position and returns the logits alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import InvalidArgumentError
from offramp.measure.cost import evaluation_mode
from offramp.model.inputs import LABEL_NAMES, Given, Tensors, parameter_names, takes_texts
from offramp.model.proof import described, logits_in
from offramp.model.texts import TEXT_NAMES

Output = str | int
"""A key or an attribute's name, or a place in a tuple."""

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def bound_by_name(backbone: nn.Module, example: Given) -> tuple[nn.Module, Given]:
    """Make an entry where the names of a dict are not those of the first inputs."""
    if not isinstance(example, Mapping) or takes_texts(backbone):
        return backbone, example
    parameters = inspect.signature(backbone.forward).parameters.values()
    given = [n for n, value in example.items() if n not in LABEL_NAMES and value is not None]
    names = [p.name for p in parameters if p.name in given and p.kind not in _VARIABLE]
    if not names and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        names = given
    needed = {p.name for p in parameters if p.default is p.empty and p.kind not in _VARIABLE}
    if not names and _takes_whole(backbone, example, given):
        return _entry(backbone, names=given, is_whole=True), {n: example[n] for n in given}
    leading = parameter_names(backbone)[: len(names)]
    if not names or tuple(names) == leading or not needed <= set(names):
        return backbone, example
    if set(names) <= set(TEXT_NAMES):
        names = [name for name in TEXT_NAMES if name in names]
    return _entry(backbone, names=names), {name: example[name] for name in names}


def _takes_whole(backbone: nn.Module, example: Mapping[str, Tensor], names: list[str]) -> bool:
    """Return True if a ``forward`` takes a batch as one dict, by trying."""
    if len(parameter_names(backbone)) == 0 or not names:
        return False
    try:
        with evaluation_mode(backbone), torch.no_grad():
            backbone({name: example[name] for name in names})
    except Exception:  # whatever the backbone's own code raises
        return False
    return True


def with_logits_alone(
    backbone: nn.Module, inputs: Tensors, output: Output | None
) -> tuple[nn.Module, Tensor]:
    """Make an entry where logits are returned among others; return the logits too."""
    with evaluation_mode(backbone), torch.no_grad():
        returned = backbone(*(tensor.clone() for tensor in inputs))
        if output is None and isinstance(returned, Tensor):
            output = _place_in_training(backbone, inputs, returned)
        elif output is None and isinstance(returned, Mapping) and "logits" in returned:
            output = None if hasattr(returned, "logits") else "logits"
        if output is None:
            return backbone, logits_in(returned, backbone)
    return _entry(backbone, output=output), logits_in(pick(returned, output), backbone)


def pick(returned: Any, output: Output) -> Any:
    """Take the logits out of what a backbone returned; a tensor is the logits."""
    if isinstance(returned, Tensor | torch.fx.Proxy):
        return returned
    if isinstance(returned, Mapping) and output in returned:
        return returned[output]
    if isinstance(output, int) and isinstance(returned, Sequence):
        with suppress(IndexError):
            return returned[output]
    if isinstance(output, str) and hasattr(returned, output):
        return getattr(returned, output)
    raise InvalidArgumentError(
        "The 'output' parameter must be the key, name or place of the logits in what the backbone "
        f"returns: {described(returned)}. Got {output!r}."
    )


def _place_in_training(backbone: nn.Module, inputs: Tensors, logits: Tensor) -> Output | None:
    """Find the logits among what is returned in training; None where they are all of it.

    Only modules that ask for the mode are in training mode here, so that there is no dropout and
    the logits are the same to the bit.
    """
    asking = [module for module in backbone.modules() if _may_ask_for_mode(type(module))]
    if not asking:
        return None
    buffers = [(buffer, buffer.clone()) for buffer in backbone.buffers()]
    try:
        for module in asking:
            module.training = True
        with torch.random.fork_rng(devices=[]):
            returned = backbone(*(tensor.clone() for tensor in inputs))
    except Exception:  # whatever the backbone's own code raises, the proof will meet
        return None
    finally:
        for module in asking:
            module.training = False
        for buffer, value in buffers:
            buffer.copy_(value)
    if isinstance(returned, Tensor) or isinstance(getattr(returned, "logits", None), Tensor):
        return None
    entries: Any = returned.items() if isinstance(returned, Mapping) else ()
    if isinstance(returned, Sequence):
        entries = enumerate(returned)
    same = [key for key, value in entries if isinstance(value, Tensor) and _equal(value, logits)]
    return same[0] if len(same) == 1 else None


def _may_ask_for_mode(kind: type) -> bool:
    """Return True if code of a class, which is not torch's own, names ``training``."""
    own = [each for each in kind.__mro__ if not each.__module__.startswith("torch.")]
    codes = [getattr(f, "__code__", None) for each in own for f in vars(each).values()]
    return any(code is not None and "training" in code.co_names for code in codes)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _entry(
    backbone: nn.Module,
    *,
    names: Sequence[str] | None = None,
    output: Output | None = None,
    is_whole: bool = False,
) -> nn.Module:
    kind = type(backbone)
    own = vars(backbone).get("forward")

    def forward(self: nn.Module, *inputs: Tensor) -> Any:
        run = own or kind.forward.__get__(self)
        by_name = dict(zip(names or (), inputs, strict=False))
        given = (by_name,) if is_whole else () if names else inputs
        returned = run(*given, **({} if is_whole else by_name))
        return returned if output is None else pick(returned, output)

    signature = inspect.signature(kind.forward)
    if names:
        each = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(n, each) for n in ("self", *names)])
    vars(forward)["__signature__"] = signature
    body = {"forward": forward, "__module__": kind.__module__, "picks_output": output is not None}
    entry: nn.Module = object.__new__(type(kind.__name__, (kind,), body))
    vars(entry).update(vars(backbone))
    vars(entry).pop("forward", None)
    return entry
