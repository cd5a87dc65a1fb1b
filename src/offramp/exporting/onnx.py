"""From modules to ONNX files with a dynamic batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._export import utils as export_utils

from offramp.errors import ArtifactError, MissingExtraError, reason
from offramp.model.multi_exit import Features, MultiExitNetwork, as_features
from offramp.policy.policies import Policy, Setting
from offramp.runtime.files import TensorSpec

if TYPE_CHECKING:
    from onnx import ModelProto

PLAIN = "plain"
"""Name of the part that is the plain network."""

THRESHOLD = "threshold"
"""The number of a gate, or of tokens that halt, which whoever loads the file may replace."""

Axes = dict[int, Any] | None
"""Free axes of a tensor, each a ``torch.export.Dim``; None for a scalar."""

_EXAMPLE_BATCH = 2
"""Samples that an export traces with; 1 and 0 are special to the tracer."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The stages up to an exit that is on, and that exit.

    Attributes:
        stages: Numbers of the stages, in order.
        exit_index: Number of the exit after them.
    """

    stages: tuple[int, ...]
    exit_index: int


def plan_steps(policy: Policy) -> tuple[StepPlan, ...]:
    """Merge the stages around exits that are off, whose heads are left out.

    Example:
        >>> from offramp import ThresholdPolicy
        >>> [step.stages for step in plan_steps(ThresholdPolicy((0.9, float("inf"))))]
        [(0,), (1, 2)]
    """
    steps, stages = [], []
    for k in range(policy.num_exits):
        stages.append(k)
        if not policy.is_off(k):
            steps.append(StepPlan(stages=tuple(stages), exit_index=k))
            stages = []
    return tuple(steps)


class StepModule(nn.Module):
    """A step as one module: stages, exit head and decision."""

    def __init__(
        self, network: MultiExitNetwork, policy: Policy, plan: StepPlan, *, num_features: int
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList([network.stages[k] for k in plan.stages])
        self.head = network.exits[plan.exit_index]
        self._policy = policy
        self._exit_index = plan.exit_index
        self._num_features = num_features

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Map (features..., state..., numbers of the policy...)."""
        names = self._policy.number_names
        carried, numbers = tensors[: -len(names)], tensors[-len(names) :]
        features = tuple(carried[: self._num_features])
        for stage in self.stages:
            features = as_features(stage(*features))
        output = self.head(*features)
        leave, confidence, state = self._policy.decide(
            self._exit_index,
            output,
            tuple(carried[self._num_features :]),
            Setting(**dict(zip(names, numbers, strict=True))),
        )
        if self._exit_index == self._policy.num_exits - 1:
            return output, confidence, leave
        return output, confidence, leave, *features, *state


def write_onnx(
    module: nn.Module,
    example: Features,
    path: Path,
    *,
    scalars: tuple[str, ...] = (),
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> None:
    """Write a module as one ONNX file, its batch size free."""
    batch = torch.export.Dim("batch", min=1)
    model = run_exporter(
        module,
        example_inputs(example, scalars),
        [*({0: batch} for _ in example), *(None for _ in scalars)],
        input_names=[*input_names, *scalars],
        output_names=output_names,
    )
    from onnx import save

    save(model, path)


def run_exporter(
    module: nn.Module,
    inputs: Features,
    axes: Sequence[Axes],
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> ModelProto:
    """Trace a module as an ONNX model."""
    try:
        with _quiet_export(), _torchlib_read_once(), _operators_listed_once():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                dynamic_shapes=(tuple(axes),),
                input_names=list(input_names),
                output_names=list(output_names),
                verbose=False,
            )
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"Writing ONNX needs {error.name}, which is not installed: pip install 'offramp[train]'"
        ) from error
    except torch.onnx.errors.OnnxExporterError as error:
        raise ArtifactError(
            f"torch cannot export this network to ONNX: {reason(error.__cause__ or error)}. "
            "Replace what its stages do that depends on values, or run it with torch."
        ) from error
    assert program is not None  # with dynamo there is always a program
    model = program.model_proto
    if any(map(_casts_to_half, model.graph.node)):
        raise ArtifactError(
            "This network computes in half precision inside (float16 or bfloat16), as under "
            "torch.autocast. Export it without, in float32."
        )
    for node in model.graph.node:
        del node.metadata_props[:]  # lines of source, and where on this machine they are
    return model


def _casts_to_half(node: Any) -> bool:
    from onnx import TensorProto

    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return any(attribute.name == "to" and attribute.i in halves for attribute in node.attribute)


def example_inputs(example: Features, scalars: Sequence[str]) -> Features:
    """Inputs to trace with."""
    tensors = tuple(_repeated(tensor, _EXAMPLE_BATCH) for tensor in example)
    return (*tensors, *(torch.tensor(0.5) for _ in scalars))


def tensor_specs(
    features: Features,
    state: Sequence[Tensor] = (),
    num_tokens: int | None = None,
    *,
    free_pixels: bool = False,
) -> tuple[TensorSpec, ...]:
    """Describe what goes into a file."""
    named = [(f"features_{i}", tensor, num_tokens) for i, tensor in enumerate(features)]
    named += [(f"state_{i}", tensor, None) for i, tensor in enumerate(state)]
    return tuple(
        TensorSpec(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            sample_shape=_sample_shape(tensor, tokens, free_pixels),
        )
        for name, tensor, tokens in named
    )


def _sample_shape(
    tensor: Tensor, num_tokens: int | None, free_pixels: bool
) -> tuple[int | None, ...]:
    if free_pixels:
        return (*tensor.shape[1:-2], None, None)
    if num_tokens is not None and tensor.shape[1:2] == (num_tokens,):
        return (None, *tensor.shape[2:])
    return tuple(tensor.shape[1:])


def _repeated(tensor: Tensor, count: int) -> Tensor:
    return tensor[:1].expand(count, *tensor.shape[1:]).contiguous()


@contextmanager
def _quiet_export() -> Iterator[None]:
    """Silence the exporter's remarks about itself; errors still come."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _torchlib_read_once() -> Iterator[None]:
    """Keep torch's table of ONNX functions, which it reads for every file: half of an export.

    The table is private to torch. Where it is not what it was, torch reads it as before.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    read = vars(ONNXRegistry).get("from_torchlib")
    if not isinstance(read, classmethod):
        yield
        return

    def from_torchlib(*args: Any, **kwargs: Any) -> Any:
        bound = read.__get__(None, ONNXRegistry)
        registry = copy(_torchlib(bound, args, tuple(kwargs.items())))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    with patch.object(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib)):
        yield


@cache
def _torchlib(read: Callable[..., Any], args: tuple[Any, ...], kwargs: tuple[Any, ...]) -> Any:
    return read(*args, **dict(kwargs))


@contextmanager
def _operators_listed_once() -> Iterator[None]:
    """Keep torch from listing all its operators anew for every table, fifty times a file.

    The function is private to torch. Without it, torch does as it likes.
    """
    name = "_materialize_cpp_cia_ops"
    fill = getattr(export_utils, name, None)
    if fill is None:
        yield
        return
    with patch.object(export_utils, name, cache(fill)):
        yield
