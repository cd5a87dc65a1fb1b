"""Counting what a network costs per sample: multiply-accumulates (MACs), weights, payload."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from offramp.errors import ShapeError
from offramp.measure.exit_costs import ExitCosts as ExitCosts


def count_macs(module: nn.Module, *inputs: Tensor) -> int:
    """Count the multiply-accumulates that a module runs for one sample.

    The module runs once, in evaluation mode and without gradients, on the first sample of the
    inputs. Matrix products, convolutions, attention and recurrent layers are counted; element-wise
    work is not, nor what makes a weight of other weights, since no sample needs it.

    Args:
        module: Any module.
        inputs: Its tensors, each with the batch axis first.
    Returns:
        MACs per sample: half the FLOPs that ``torch.utils.flop_counter`` counts.
    Raises:
        ShapeError: If an input has no sample in it.
    Example:
        >>> import torch
        >>> count_macs(torch.nn.Linear(784, 10), torch.zeros(1, 784))
        7840
    """
    return run_and_count(module, *inputs)[1]


def run_and_count(module: nn.Module, *inputs: Tensor) -> tuple[Any, int]:
    """Run a module as :func:`count_macs` does: what it returns for the first sample, and MACs."""
    require_samples("inputs", inputs)
    with torch.no_grad(), evaluation_mode(module), _settled_weights(module):
        with counting_macs() as counted:
            output = module(*(tensor[:1] for tensor in inputs))
        return output, counted()


def require_samples(what: str, tensors: Sequence[Tensor]) -> None:
    """Refuse tensors without a sample in them."""
    for tensor in tensors:
        if tensor.ndim == 0 or tensor.shape[0] == 0:
            raise ShapeError(
                f"Expected {what} with a batch axis of at least one sample. "
                f"Got shape {tuple(tensor.shape)}."
            )


def parameter_bytes(*modules: nn.Module) -> int:
    """Bytes of weights that modules read, each parameter once however often it is used.

    Example:
        >>> import torch
        >>> parameter_bytes(torch.nn.Linear(784, 10))
        31400
    """
    unique = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() * p.element_size() for p in unique.values())


def payload_bytes(*tensors: Tensor) -> int:
    """Bytes of one sample of what crosses from a stage to the next, headers not counted.

    Example:
        >>> import torch
        >>> payload_bytes(torch.zeros(8, 64, 7, 7), torch.zeros(8, dtype=torch.int64))
        12552
    """
    return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _settled_weights(module: nn.Module) -> Iterator[None]:
    """Freeze weights inside the block, and make those that are made of others, once.

    The counter hangs hooks on what needs a gradient, which fails where a module is given a weight:
    that of a parametrised layer, or the query of a pooling by attention.
    """
    trained = [p for p in module.parameters() if p.requires_grad and p.is_leaf]
    with ExitStack() as stack:
        for parameter in trained:
            stack.callback(parameter.requires_grad_)
            parameter.requires_grad_(False)
        stack.enter_context(parametrize.cached())
        for child in module.modules():
            if parametrize.is_parametrized(child):
                assert isinstance(child.parametrizations, nn.ModuleDict)
                for name in child.parametrizations:
                    getattr(child, name)
        yield


@contextmanager
def counting_macs() -> Iterator[_MacCounter]:
    """Count the MACs of everything that runs inside the block; call the result to read them."""
    # Fused attention is invisible to the counter: go around it.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False, custom_mapping=_own_counters())
        with counter, sdpa_kernel(SDPBackend.MATH):
            yield _MacCounter(counter)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _own_counters() -> dict[Any, Any]:
    """Counters for kernels that torch's counter does not know, in FLOPs."""

    def linear(inputs: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
        return 2 * inputs[-1] * out_shape.numel()

    def recurrent_layer(
        inputs: torch.Size, of_input: torch.Size, of_state: torch.Size, *_: object, **__: object
    ) -> int:
        steps = inputs[:-1].numel()  # of all sequences
        return 2 * steps * (of_input.numel() + of_state.numel())

    names = ("linear_dynamic", "linear_relu_dynamic", "linear_dynamic_fp16")
    quantised = {getattr(torch.ops.quantized, name): linear for name in names}
    return {**quantised, torch.ops.aten.mkldnn_rnn_layer: recurrent_layer}


class _MacCounter:
    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter

    def __call__(self) -> int:
        return int(self._counter.get_total_flops()) // 2


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode inside the block and restore every submodule's mode after."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
