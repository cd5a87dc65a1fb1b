"""From modules to ONNX files with a dynamic batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import ArtifactError, MissingExtraError, reason
from offramp.model.multi_exit import Features, MultiExitNetwork, as_features
from offramp.policy.policies import Policy, Setting

_EXAMPLE_BATCH = 2
"""Samples that an export traces with; 1 and 0 are special to the tracer."""

_MOST_TOKENS = 512
"""Longest sample of a network of tokens; the table of positions of BERT is as long."""


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

    Args:
        policy: Says which exits are off.
    Returns:
        One step per exit that is on, in order.
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
    """A step as one module: stages, exit head and decision.

    Args:
        network: The network.
        policy: Who leaves where; its numbers come in as inputs.
        plan: Which stages and exit.
        num_features: How many of the inputs are features; then comes the policy's state.
    """

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
        """Map (features..., state..., temperature, threshold).

        Returns:
            ``(output, confidence, leave, features..., state...)``, the last two not at the final
            exit.
        """
        *carried, temperature, threshold = tensors
        features = tuple(carried[: self._num_features])
        for stage in self.stages:
            features = as_features(stage(*features))
        output = self.head(*features)
        leave, confidence, state = self._policy.decide(
            self._exit_index,
            output,
            tuple(carried[self._num_features :]),
            Setting(temperature, threshold),
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
    free_tokens: Sequence[bool] | None = None,
) -> None:
    """Write a module as one ONNX file, its batch size free.

    Args:
        module: A module in evaluation mode.
        example: Its inputs, each with the batch axis first, one sample at least.
        path: The file to write.
        scalars: Names of the scalar inputs that follow.
        input_names: Names of the inputs with a batch axis.
        output_names: Names of all outputs.
        free_tokens: Whether the second axis of each input, its tokens, is free as well; none if
            None.
    Raises:
        MissingExtraError: If the packages that write ONNX are not installed.
        ArtifactError: If torch cannot export the module.
    """
    batch = torch.export.Dim("batch", min=1)
    inputs = tuple(_repeated(tensor, _EXAMPLE_BATCH) for tensor in example)
    inputs += tuple(torch.tensor(0.5) for _ in scalars)
    tokens = torch.export.Dim("tokens", min=1, max=_MOST_TOKENS)
    axes: list[dict[int, Any] | None] = [
        {0: batch, 1: tokens} if is_free else {0: batch}
        for is_free in free_tokens or [False] * len(example)
    ]
    shapes = (*axes, *(None for _ in scalars))
    try:
        with _quiet_export():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                dynamic_shapes=(shapes,),
                input_names=[*input_names, *scalars],
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
    program.save(path, external_data=False)


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
