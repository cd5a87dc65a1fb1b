"""Inputs as people bring them, in the form that a network is called with.

Shapes: ``B`` batch, ``T`` tokens of the longest sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from offramp.errors import InvalidArgumentError, OfframpError, ShapeError, reason
from offramp.model.ragged import Ragged
from offramp.model.tensors import listed, stacked, to_tensor, type_name
from offramp.model.texts import TEXT_NAMES, as_texts, named_texts, with_types

Tensors = tuple[Tensor, ...]

Given = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Inputs as a caller gives them: a tensor, several in order, or a dict by name."""

LABEL_NAMES = ("labels", "label", "targets", "target", "label_ids", "y")
"""Names under which a dict may hold its labels: no inputs."""

_IMAGE_NAMES = ("pixel_values", "image", "images", "img", "inputs", "input", "features", "x")


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One input of a network, as its example showed it.

    Attributes:
        name: As the backbone's ``forward`` calls it.
        sample_shape: Shape of a sample in the example.
        dtype: Type of the example.
    """

    name: str
    sample_shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        sizes = "".join(f", {size}" for size in self.sample_shape)
        return f"(B{sizes}) of {type_name(self.dtype)}"


class TakesInputs(Protocol):
    """A network that says what it takes.

    Attributes:
        input_specs: Its inputs in order; empty where no example showed them.
        ragged: Where padding is marked; None where all samples are of one size.
    """

    input_specs: tuple[InputSpec, ...]

    @property
    def ragged(self) -> Ragged | None:
        """See above."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights."""
        ...


def as_inputs(
    given: object,
    network: TakesInputs | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensors:
    """Bring a batch of inputs into the form that a network is called with.

    What has one meaning is converted: arrays become tensors, floats the type of the network's
    weights, ids int64; a text without a mask gets one of ones. By position, inputs mean what they
    mean to the backbone's ``forward``.
    """
    while isinstance(given, tuple) and len(given) == 1:
        (given,) = given
    if network is not None and torch.compiler.is_compiling():
        network = None  # values cannot be looked at there
    if isinstance(given, Mapping):
        given = _by_name(given, network)
    inputs = _as_tensors(given, network)
    if network is not None:
        specs = network.input_specs
        if network.ragged is not None:
            inputs = as_texts(inputs, network.ragged)
            if specs:
                inputs = with_types(inputs, len(specs))
        elif specs and len(inputs) != len(specs):
            names = ", ".join(spec.name for spec in specs)
            raise ShapeError(f"Expected the inputs {names}. Got {len(inputs)} inputs.")
        inputs = tuple(
            _fitting(tensor, specs[i] if i < len(specs) else None, network)
            for i, tensor in enumerate(inputs)
        )
    return inputs if device is None else tuple(tensor.to(device) for tensor in inputs)


def example_inputs(
    backbone: nn.Module, example: object, ragged: Ragged | None
) -> tuple[Tensors, tuple[InputSpec, ...]]:
    """Bring the example of ``add_exits`` into the form that a backbone is called with."""
    names = TEXT_NAMES if ragged is not None else parameter_names(backbone)
    if isinstance(example, Mapping):
        example = _leading(example, names) if ragged is None else named_texts(example, ragged)
    inputs = tuple(_in_own_floats(tensor, backbone) for tensor in as_inputs(example))
    if ragged is not None:
        inputs = as_texts(inputs, ragged)
    specs = tuple(
        InputSpec(
            name=names[i] if i < len(names) else f"input_{i}",
            sample_shape=tuple(tensor.shape[1:]),
            dtype=tensor.dtype,
        )
        for i, tensor in enumerate(inputs)
    )
    return inputs, specs


def takes_texts(backbone: nn.Module) -> bool:
    """Return True if a backbone takes token ids and their mask first, named as by a tokenizer."""
    return parameter_names(backbone)[:2] == TEXT_NAMES[:2]


@contextmanager
def explained(inputs: Tensors, specs: tuple[InputSpec, ...] = ()) -> Iterator[None]:
    """Say in one line what torch raises where a network cannot take its inputs."""
    try:
        yield
    except (OfframpError, torch.OutOfMemoryError):
        raise
    except (
        *(RuntimeError, IndexError, TypeError, ValueError),
        *(AttributeError, KeyError, AssertionError),
    ) as error:
        shapes = " and ".join(f"{tuple(t.shape)} of {type_name(t.dtype)}" for t in inputs)
        expected = " and ".join(map(str, specs))
        advice = f" Its example was {expected}." if expected else ""
        if isinstance(error, IndexError) and "index out of range" in str(error):
            advice = " An id is beyond an embedding: is it of another tokenizer's vocabulary?"
        elif not expected and len(inputs) > 1:
            advice = " Give them in the order of its forward, with none left out between them."
        elif not expected and any(not t.is_floating_point() for t in inputs):
            advice = " If it takes floats, scale to them as in training: images.float() / 255."
        raise ShapeError(
            f"The network does not take inputs {shapes}: {reason(error).rstrip('.')}.{advice}"
        ) from error


def _by_name(given: Mapping[Any, Any], network: TakesInputs | None) -> object:
    """The inputs that a dict holds, in the network's order."""
    if network is not None and network.ragged is not None:
        return named_texts(given, network.ragged)
    specs = () if network is None else network.input_specs
    if len(specs) > 1:
        return _leading(given, [spec.name for spec in specs], least=len(specs))
    names = [spec.name for spec in specs]
    found = [name for name in (*names, *_IMAGE_NAMES, TEXT_NAMES[0]) if name in given]
    if not found:
        found = [name for name in given if name not in LABEL_NAMES]
        if len(found) != 1:
            raise InvalidArgumentError(
                f"Expected a dict with the input under {(*names, *_IMAGE_NAMES)[0]!r}. "
                f"Got the keys {listed(given)}."
            )
    elif names[:1] != found[:1] and len(dict.fromkeys(found)) > 1:
        raise InvalidArgumentError(
            f"Expected a dict with one input. Got {listed(found)}: leave the others out."
        )
    return given[found[0]]


def _leading(given: Mapping[Any, Any], names: Sequence[str], *, least: int = 1) -> Tensors:
    """Entries by the names of the first inputs, none left out in between."""
    there = [name for name in names if name in given and name not in LABEL_NAMES]
    if len(there) < least or there != list(names[: len(there)]):
        raise InvalidArgumentError(
            f"Expected a dict with the inputs in the order {', '.join(names[: least + 4])}, none "
            f"left out. Got the keys {listed(given)}."
        )
    return tuple(to_tensor(given[name]) for name in there)


def _as_tensors(given: object, network: TakesInputs | None) -> Tensors:
    is_several = isinstance(given, tuple | list) and all(
        isinstance(value, Tensor | np.ndarray) for value in given
    )
    if not isinstance(given, tuple | list) or not is_several or not given:
        return (to_tensor(given),)
    tensors = tuple(map(to_tensor, given))
    specs = () if network is None else network.input_specs
    if isinstance(given, list) and len(specs) == 1:
        num_axes = len(specs[0].sample_shape)
        if all(tensor.ndim == num_axes for tensor in tensors):  # samples, not yet stacked
            return (stacked(tensors),)
    return tensors


def _fitting(tensor: Tensor, spec: InputSpec | None, network: TakesInputs) -> Tensor:
    """A tensor of the type that the network computes in."""
    is_float = tensor.is_floating_point()
    if spec is not None:
        num_axes = 1 + len(spec.sample_shape)
        if tensor.ndim == num_axes - 1 and tensor.ndim:
            raise ShapeError(
                f"Expected {spec.name} with a batch axis first, {spec}. "
                f"Got {tuple(tensor.shape)}: for one sample, add it with {spec.name}[None]."
            )
        if tensor.ndim != num_axes:
            raise ShapeError(
                f"Expected {spec.name} of {num_axes} axes, {spec}, as in the example. "
                f"Got {tuple(tensor.shape)}."
            )
        if is_float != spec.dtype.is_floating_point:
            advice = "scale it to floats as in training, as images.float() / 255"
            raise InvalidArgumentError(
                f"Expected {spec.name} as {spec}, as in the example. Got {type_name(tensor.dtype)}"
                + (f": {advice}." if not is_float else ".")
            )
        if not is_float and spec.dtype == torch.int64:
            return tensor.long()
    return _in_own_floats(tensor, network)


def _in_own_floats(tensor: Tensor, network: TakesInputs | nn.Module) -> Tensor:
    """A tensor of the floats that the network's weights are of."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float32:
        return tensor
    own = next((p.dtype for p in network.parameters() if p.is_floating_point()), tensor.dtype)
    return tensor.to(own)


def parameter_names(backbone: nn.Module) -> tuple[str, ...]:
    """Names of the inputs that a module's ``forward`` takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(backbone.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)
