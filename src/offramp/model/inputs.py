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

Tensors = tuple[Tensor, ...]

Given = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Inputs as a caller gives them: a tensor, several in order, or a dict by name."""

TEXT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
"""Inputs of a text model, in the order in which it takes them; tokenizers return another one."""

LABEL_NAMES = ("labels", "label", "targets", "target", "label_ids", "y")
"""Names under which a dict may hold its labels: no inputs."""

_IMAGE_NAMES = ("pixel_values", "image", "images", "img", "inputs", "input", "features", "x")
_UNKNOWN_TO_EXITS = ("inputs_embeds", "position_ids", "head_mask")


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
        return f"(B{sizes}) of {_name_of(self.dtype)}"


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

    Args:
        given: A tensor or array, a tuple or list of them, or a dict by the names of the backbone's
            ``forward``; other entries of the dict are left out.
        network: What will run them; nothing is known of it if None.
        device: Where they shall be; where they are if None.
    Returns:
        The tensors, each with the batch axis first.
    Raises:
        ShapeError: If their number, or a number of axes, is not what the network takes.
        InvalidArgumentError: If they are no tensors or of the wrong kind, or a text begins with
            padding.
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
            inputs = _as_texts(inputs, network.ragged)
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
    """Bring the example of ``add_exits`` into the form that a backbone is called with.

    Args:
        backbone: Any module.
        example: As for :func:`as_inputs`.
        ragged: Where a text model marks padding; None for other backbones.
    Returns:
        inputs: The tensors, in the order of the backbone's ``forward``.
        specs: What they say of its inputs.
    Raises:
        InvalidArgumentError: If there are no inputs in it, or they leave one out in between.
    """
    names = TEXT_NAMES if ragged is not None else _parameters(backbone)
    if isinstance(example, Mapping):
        example = _leading(example, names) if ragged is None else _named_texts(example, ragged)
    inputs = tuple(_in_own_floats(tensor, backbone) for tensor in as_inputs(example))
    if ragged is not None:
        inputs = _as_texts(inputs, ragged)
    specs = tuple(
        InputSpec(
            name=names[i] if i < len(names) else f"input_{i}",
            sample_shape=tuple(tensor.shape[1:]),
            dtype=tensor.dtype,
        )
        for i, tensor in enumerate(inputs)
    )
    return inputs, specs


@contextmanager
def explained(inputs: Tensors, specs: tuple[InputSpec, ...] = ()) -> Iterator[None]:
    """Say in one line what torch raises where a network cannot take its inputs.

    Args:
        inputs: What it is given.
        specs: What its example was; empty without one.
    Raises:
        ShapeError: In place of an error of torch's.
    """
    try:
        yield
    except (OfframpError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        shapes = " and ".join(f"{tuple(t.shape)} of {_name_of(t.dtype)}" for t in inputs)
        expected = " and ".join(map(str, specs))
        advice = f" Its example was {expected}." if expected else ""
        if not expected and any(not t.is_floating_point() for t in inputs):
            advice = " If it takes floats, scale to them as in training: images.float() / 255."
        raise ShapeError(
            f"The network does not take inputs {shapes}: {reason(error).rstrip('.')}.{advice}"
        ) from error


def _by_name(given: Mapping[Any, Any], network: TakesInputs | None) -> object:
    """The inputs that a dict holds, in the network's order."""
    if network is not None and network.ragged is not None:
        return _named_texts(given, network.ragged)
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
                f"Got the keys {_listed(given)}."
            )
    elif names[:1] != found[:1] and len(dict.fromkeys(found)) > 1:
        raise InvalidArgumentError(
            f"Expected a dict with one input. Got {_listed(found)}: leave the others out."
        )
    return given[found[0]]


def _leading(given: Mapping[Any, Any], names: Sequence[str], *, least: int = 1) -> Tensors:
    """Entries by the names of the first inputs, none left out in between."""
    there = [name for name in names if name in given and name not in LABEL_NAMES]
    if len(there) < least or there != list(names[: len(there)]):
        raise InvalidArgumentError(
            f"Expected a dict with the inputs in the order {', '.join(names[: least + 4])}, none "
            f"left out. Got the keys {_listed(given)}."
        )
    return tuple(_tensor(given[name]) for name in there)


def _named_texts(given: Mapping[Any, Any], ragged: Ragged) -> Tensors:
    """Token ids, mask and token types, as far as a network takes them."""
    foreign = [name for name in _UNKNOWN_TO_EXITS if given.get(name) is not None]
    if given.get(TEXT_NAMES[0]) is None or foreign:
        raise InvalidArgumentError(
            f"Expected a dict with {', '.join(TEXT_NAMES)}, of which the first is needed. "
            f"Got the keys {_listed(given)}."
        )
    ids, mask, types = (
        None if given.get(name) is None else _tensor(given[name]) for name in TEXT_NAMES
    )
    assert ids is not None
    if ragged.pad_id is not None:
        return (_padded_ids(ids, mask, types, ragged.pad_id),)
    mask = torch.ones_like(ids) if mask is None else mask
    return (ids, mask) if types is None else (ids, mask, types)


def _padded_ids(
    ids_BT: Tensor, mask_BT: Tensor | None, types: Tensor | None, pad_id: int
) -> Tensor:
    """Ids for a network that knows padding by its id, which the mask must agree with."""
    if types is not None and bool(types.any()):
        raise InvalidArgumentError(
            "Expected texts of one token type. Got token_type_ids other than 0, which this network "
            "does not take."
        )
    if mask_BT is None:
        return ids_BT
    _check_texts((ids_BT, mask_BT))
    _check_mask(mask_BT)
    is_padding_BT = mask_BT == 0
    if bool(((ids_BT == pad_id) & ~is_padding_BT).any()):
        raise InvalidArgumentError(
            f"Expected an attention mask of 0 where the id is {pad_id}, which is padding to this "
            "network. Got a mask of 1 there."
        )
    return ids_BT.masked_fill(is_padding_BT, pad_id)


def _as_texts(inputs: Tensors, ragged: Ragged) -> Tensors:
    """Token ids with their mask, made where there is none, and checked."""
    _check_texts(inputs)
    if ragged.pad_id is not None:
        if len(inputs) > 1:
            raise ShapeError(f"Expected one input, token ids of texts. Got {len(inputs)}.")
        return (inputs[0].long(),)
    ids_BT, *rest = inputs
    mask_BT = rest[0] if rest else torch.ones_like(ids_BT)
    _check_mask(mask_BT)
    if len(inputs) > 2 and bool(inputs[2][:, 0].any()):
        raise InvalidArgumentError(
            f"Expected token types that are 0 at a text's first token, as {TEXT_NAMES[2]} are in "
            f"the order {', '.join(TEXT_NAMES)}. Got others: pass a dict with these names."
        )
    return tuple(tensor.long() for tensor in (ids_BT, mask_BT, *rest[1:]))


def _check_texts(inputs: Tensors) -> None:
    if len(inputs) > len(TEXT_NAMES) or inputs[0].ndim != 2:
        raise ShapeError(
            f"Expected token ids of shape (B, T), and {' and '.join(TEXT_NAMES[1:])} of the same "
            f"where there are any. Got {', '.join(str(tuple(t.shape)) for t in inputs)}."
        )
    if any(tensor.shape != inputs[0].shape for tensor in inputs):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise ShapeError(f"Expected {', '.join(TEXT_NAMES)} of one shape (B, T). Got {shapes}.")
    if inputs[0].is_floating_point():
        raise InvalidArgumentError(
            f"Expected token ids, which are whole numbers. Got {_name_of(inputs[0].dtype)}."
        )


def _check_mask(mask_BT: Tensor) -> None:
    order = f"Pass a dict; by position, the order is {', '.join(TEXT_NAMES)}."
    if not bool(((mask_BT == 0) | (mask_BT == 1)).all()):
        raise InvalidArgumentError(
            "Expected an attention mask of 0 and 1. "
            f"Got values from {mask_BT.min().item()} to {mask_BT.max().item()}. {order}"
        )
    is_late_B = mask_BT[:, 0] == 0
    if bool(is_late_B.any()):
        text = int(is_late_B.int().argmax())
        hides = "every" if not bool(mask_BT[text].any()) else "the first"
        raise InvalidArgumentError(
            "Expected texts that begin with a token. "
            f"The attention mask hides {hides} token of text {text}. {order}"
        )


def _as_tensors(given: object, network: TakesInputs | None) -> Tensors:
    is_several = isinstance(given, tuple | list) and all(
        isinstance(value, Tensor | np.ndarray) for value in given
    )
    if not isinstance(given, tuple | list) or not is_several or not given:
        return (_tensor(given),)
    tensors = tuple(map(_tensor, given))
    specs = () if network is None else network.input_specs
    if isinstance(given, list) and len(specs) == 1:
        num_axes = len(specs[0].sample_shape)
        if all(tensor.ndim == num_axes for tensor in tensors):  # samples, not yet stacked
            return (_stacked(tensors),)
    return tensors


def _stacked(samples: Tensors) -> Tensor:
    sizes = sorted({tuple(sample.shape) for sample in samples})
    if len(sizes) > 1:
        raise ShapeError(
            f"Expected samples of one size in a batch. Got {sizes[0]} and {sizes[1]}: resize, crop "
            "or pad them."
        )
    return torch.stack(samples)


def _tensor(value: object) -> Tensor:
    """A tensor of what is one: tensors, arrays and lists of numbers."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and value:
        if all(isinstance(item, Tensor) for item in value):
            return _stacked(tuple(value))
        if type(value[0]).__module__.partition(".")[0] == "PIL":
            value = value[0]
    if isinstance(value, np.ndarray | np.generic | list | tuple | int | float):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ShapeError(
                "Expected samples of one size in a batch. Got lists of several: resize, crop or "
                "pad them."
            ) from error
        if array.dtype.kind in "biuf" and array.size:
            return torch.tensor(array)
    raise InvalidArgumentError(_no_tensor(value))


def _no_tensor(value: object) -> str:
    first = value
    while isinstance(first, list | tuple | np.ndarray) and len(first):
        first = first[0]
    if isinstance(first, str | bytes):
        advice = f"text such as {first[:20]!r}: turn it into token ids with a tokenizer first"
    elif type(first).__module__.partition(".")[0] == "PIL":
        advice = "a PIL image: turn it into a tensor first, as torchvision's ToTensor does"
    else:
        advice = f"{type(first).__name__}: turn it into a tensor with the batch axis first"
    return f"Expected inputs as a tensor, a tuple of tensors or a dict of them. Got {advice}."


def _fitting(tensor: Tensor, spec: InputSpec | None, network: TakesInputs) -> Tensor:
    """A tensor of the type that the network computes in."""
    is_float = tensor.is_floating_point()
    if spec is not None:
        if tensor.ndim == len(spec.sample_shape) and tensor.ndim:
            raise ShapeError(
                f"Expected {spec.name} with a batch axis first, {spec}. "
                f"Got {tuple(tensor.shape)}: for one sample, add it with {spec.name}[None]."
            )
        if is_float != spec.dtype.is_floating_point:
            advice = "scale it to floats as in training, as images.float() / 255"
            raise InvalidArgumentError(
                f"Expected {spec.name} as {spec}, as in the example. Got {_name_of(tensor.dtype)}"
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


def _parameters(backbone: nn.Module) -> tuple[str, ...]:
    """Names of the inputs that a module's ``forward`` takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(backbone.forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Iterator[Any] | Mapping[Any, Any] | Sequence[Any]) -> str:
    return ", ".join(map(repr, names)) or "none"
