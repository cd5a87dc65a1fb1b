"""Bundles of networks with exits: a file a step, and one with all steps for batches of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from io import StringIO
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offramp.errors import ArtifactError
from offramp.exporting.graph import Graph
from offramp.exporting.onnx import (
    PLAIN,
    StepModule,
    StepPlan,
    example_inputs,
    plan_steps,
    tensor_specs,
)
from offramp.exporting.parts import Part
from offramp.families.exits import EXITS
from offramp.measure.agreement import Reference
from offramp.measure.cost import parameter_bytes, payload_bytes
from offramp.measure.exit_costs import ExitCosts
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.offload.codec import channel_scales
from offramp.policy.policies import Policy, State, ThresholdedPolicy, never_leave
from offramp.runtime import Bundle, Step, with_thresholds
from offramp.runtime.bundle import SINGLE_OUTPUTS, Padding, single_numbers
from offramp.runtime.dense import MAP_STRIDES, map_cells
from offramp.runtime.files import OnnxFile, TensorSpec

Array = npt.NDArray[Any]

_MOST_COUNTED = 32
"""In tokens: the longest sample whose MACs are counted, where samples are of unequal length."""

_SIZES = ((8, 8), (9, 8), (10, 11), (12, 16), (13, 9), (16, 9), (17, 25), (21, 15))
"""In multiples of what images may measure: where the MACs of images of any size are counted."""


def join_exits(graph: Graph, bundle: Bundle) -> dict[str, str]:
    """After each step, ``If`` leave, the answer is handed out; else the next step runs."""
    for name, value in single_numbers(bundle.steps).items():
        graph.number(name, value)

    def run(inside: Graph, index: int, carried: Sequence[str]) -> Sequence[str]:
        step = bundle.steps[index]
        numbers = [f"{name}_{index}" for name in step.numbers]
        output, confidence, leave, *handed_on = inside.add(step.file, [*carried, *numbers])
        answer = output, confidence, inside.constant([index])
        if index == len(bundle.steps) - 1:
            return answer
        return inside.choose(
            leave, lambda _: answer, lambda branch: run(branch, index + 1, handed_on)
        )

    first = bundle.steps[0]
    inputs = graph.take_inputs(first.file, len(first.features))
    return dict(zip(SINGLE_OUTPUTS, run(graph, 0, inputs), strict=True))


@dataclass(frozen=True)
class ExitsExport:
    """A network with exits, and who leaves where.

    Attributes:
        network: The network, in evaluation mode, on the CPU.
        inputs: Samples to export with.
        policy: Its policy.
    """

    network: MultiExitNetwork
    inputs: Features
    policy: Policy

    def parts(self) -> dict[str, Part]:
        """Steps, and the plain network."""
        return {
            **{f"step_{step.plan.exit_index}": self._part_of(step) for step in self._steps},
            PLAIN: replace(
                self._part(self.network.plain().eval(), self._steps[0].features), is_apart=True
            ),
        }

    def describe(self, files: Mapping[str, OnnxFile]) -> dict[str, Any]:
        """Describe the network for ``bundle.json``."""
        network = self.network
        costs = network.costs(*self.inputs).with_decisions(self.policy.decision_macs)
        return {
            "steps": tuple(self._described(files, costs)),
            "plain_macs": costs.plain_macs,
            "padding": None if network.ragged is None else Padding(**asdict(network.ragged)),
            "pixel_multiple": self._by_size[0] if self._by_size else None,
        }

    join = staticmethod(join_exits)

    def reference(self, inputs: Features) -> Reference:
        """Compute the expected answers: the all-exits loop."""
        return EXITS.reference(self.network, self.policy, inputs)

    def extremes(self, bundle: Bundle) -> list[tuple[Bundle, ExitsExport]]:
        """The bundle at thresholds that run every part of it: nobody leaves."""
        nobody = with_thresholds(bundle, [math.inf] * (len(bundle.steps) - 1))
        stays = self.policy
        if isinstance(stays, ThresholdedPolicy):
            stays = stays.with_thresholds([math.inf] * (self.network.num_exits - 1))
        else:
            stays = never_leave(self.network.num_exits)
        return [(nobody, replace(self, policy=stays))]

    @cached_property
    def _by_size(self) -> tuple[int, _Formula] | None:
        return _macs_by_size(self.network, self.policy, self.inputs)

    @cached_property
    def _steps(self) -> list[_PlannedStep]:
        """Collect the inputs of each step for one sample that never leaves."""
        network, policy = self.network, self.policy
        features = _first_sample(network, self.inputs)
        state: State = ()
        steps = []
        for plan in plan_steps(policy):
            step = _PlannedStep(plan, features, state)
            steps.append(step)
            for stage in plan.stages:
                features = network.run_stage(stage, features)
            k = plan.exit_index
            _, _, state = policy.step(k, network.run_exit(k, features), state)
        return steps

    def _specs(self, features: Features, state: State = ()) -> tuple[TensorSpec, ...]:
        num_tokens = None if self.network.ragged is None else self._steps[0].features[0].shape[1]
        return tensor_specs(features, state, num_tokens, free_pixels=self._by_size is not None)

    def _part_of(self, step: _PlannedStep) -> Part:
        later = [other for other in self._steps if other.plan.exit_index > step.plan.exit_index]
        handed_on = self._specs(later[0].features, later[0].state) if later else ()
        return self._part(
            step.module(self.network, self.policy),
            step.features,
            step.state,
            scalars=self.policy.number_names,
            output_names=("output", "confidence", "leave", *(f"next_{s.name}" for s in handed_on)),
        )

    def _part(
        self,
        module: nn.Module,
        features: Features,
        state: State = (),
        *,
        scalars: tuple[str, ...] = (),
        output_names: tuple[str, ...] = ("output",),
    ) -> Part:
        specs = self._specs(features, state)
        # How the sizes of several maps hang together is for torch to find out.
        size = "positions" if self._by_size is None else None
        free = [
            {i: size for i, n in enumerate(spec.sample_shape, 1) if n is None} for spec in specs
        ]
        return Part(
            call=module,
            example=example_inputs((*features, *state), ()),
            free_axes=tuple({0: "batch", **axes} for axes in free),
            scalars=scalars,
            input_names=tuple(spec.name for spec in specs),
            output_names=output_names,
        )

    def _described(self, files: Mapping[str, OnnxFile], costs: ExitCosts) -> Iterator[Step]:
        network, policy = self.network, self.policy
        exit_macs = costs.exit_macs(policy.off_exits)
        by_length = _macs_by_length(network, policy, self.inputs)
        scales = _channel_scales(network, self.inputs)
        counts_pixels = "pixel_threshold" in policy.number_names
        for step, after in zip(self._steps, [*self._steps[1:], None], strict=True):
            plan, k = step.plan, step.plan.exit_index
            file, setting = files[f"step_{k}"], policy.setting(k)
            specs = self._specs(step.features, step.state)
            yield Step(
                file=file.name,
                sha256=file.sha256,
                exit_index=k,
                temperature=float(setting.temperature),
                threshold=float(setting.threshold),
                features=specs[: len(step.features)],
                state=specs[len(step.features) :],
                stage_macs=sum(costs.stage_macs[stage] for stage in plan.stages),
                head_macs=costs.head_macs[k],
                exit_macs=exit_macs[k],
                payload_bytes=0 if after is None else payload_bytes(*after.features, *after.state),
                parameter_bytes=parameter_bytes(step.module(network, policy)),
                **_by("length", by_length, plan),
                **_by("size", self._by_size[1] if self._by_size else None, plan),
                pixel_threshold=float(setting.pixel_threshold) if counts_pixels else None,
                channel_scales=scales[plan.stages[0]],
            )


@dataclass(frozen=True)
class _PlannedStep:
    """A step, and what it is given of one sample."""

    plan: StepPlan
    features: Features
    state: State

    def module(self, network: MultiExitNetwork, policy: Policy) -> StepModule:
        """The step as a module."""
        return StepModule(network, policy, self.plan, num_features=len(self.features)).eval()


def _channel_scales(
    network: MultiExitNetwork, inputs: Features
) -> list[tuple[tuple[float, ...], ...]]:
    """Of each feature before each stage, how much a number of 8 bits counts in each channel."""
    features = network.trimmed(inputs)
    scales = []
    for stage in range(network.num_exits):
        scales.append(
            tuple(
                channel_scales(tensor.numpy()) if tensor.dtype == torch.float32 else ()
                for tensor in features
            )
        )
        features = network.run_stage(stage, features)
    return scales


def _first_sample(network: MultiExitNetwork, inputs: Features) -> Features:
    """A batch of one to export with; of two tokens at least, since one is special to the tracer."""
    sample = network.trimmed(tuple(tensor[:1] for tensor in inputs))
    if network.ragged is None or sample[0].shape[1] > 1:
        return sample
    return tuple(tensor.repeat(1, 2) for tensor in sample)


@dataclass(frozen=True)
class _Formula:
    """Numbers that MACs are made of, where they go by a sample's length or size.

    Attributes:
        exits: Up to each exit.
        stages: Of each stage alone.
    """

    exits: Array
    stages: Array


def _by(what: str, formula: _Formula | None, plan: StepPlan) -> dict[str, tuple[int, ...] | None]:
    """A step's part of a formula, by the names of its attributes."""
    names = f"exit_macs_by_{what}", f"stage_macs_by_{what}"
    if formula is None:
        return dict.fromkeys(names)
    stages = formula.stages[list(plan.stages)].sum(0)
    numbers = formula.exits[plan.exit_index], stages
    return {name: tuple(row.tolist()) for name, row in zip(names, numbers, strict=True)}


def _fitted(basis: Array, policy: Policy, costs: Sequence[ExitCosts]) -> _Formula | None:
    """The whole numbers that say all costs exactly; None if there are none."""
    exits = [
        each.with_decisions(policy.decision_macs).exit_macs(policy.off_exits) for each in costs
    ]
    stages = [each.stage_macs for each in costs]
    ranks = [np.linalg.matrix_rank(basis[:, k:]) for k in range(basis.shape[1])]
    own = [k for k, (rank, after) in enumerate(pairwise([*ranks, 0])) if rank > after]
    fitted = []
    for macs in (np.array(exits), np.array(stages)):
        numbers = np.zeros((basis.shape[1], macs.shape[1]), dtype=np.int64)
        numbers[own] = np.linalg.lstsq(basis[:, own], macs, rcond=None)[0].round()
        if (basis @ numbers != macs).any():
            return None
        fitted.append(numbers.T)
    return _Formula(*fitted)


def _macs_by_length(network: MultiExitNetwork, policy: Policy, inputs: Features) -> _Formula | None:
    """MACs up to each exit as a polynomial in a sample's tokens; None where all are of one size.

    Layers cost so much a token, attention so much a pair of tokens: three lengths say it all.
    """
    if network.ragged is None:
        return None
    # No longer than the samples, if three lengths allow it: the network may take no longer ones.
    longest = max(3, min(inputs[0].shape[1], _MOST_COUNTED))
    lengths = (longest // 3, 2 * longest // 3, longest)
    costs = [network.costs_at(length, inputs) for length in lengths]
    formula = _fitted(np.vander(lengths, 3, increasing=True), policy, costs)
    if formula is None:
        raise ArtifactError(
            "The MACs of this network are no polynomial of degree 2 in its tokens, which a bundle "
            "could write down. Run it with torch."
        )
    return formula


def _macs_by_size(
    network: MultiExitNetwork, policy: Policy, inputs: Features
) -> tuple[int, _Formula] | None:
    """MACs up to each exit by the cells of feature maps, where sides are multiples of a number.

    None where images have one size only, or maps are no whole parts of any image, as in a network
    that scales it.
    """
    if network.pixel_multiple is None:
        return None
    for times in (1, 2, 4, 8, 16, 32):  # so that all maps are whole parts of the image
        multiple = times * network.pixel_multiple
        if times > 1 and multiple > max(MAP_STRIDES):
            break
        sizes = [tuple(multiple * n for n in size) for size in _SIZES]
        try:
            with redirect_stderr(StringIO()):  # torch.fx prints where a graph failed
                costs = [
                    network.costs(*(t.new_zeros((1, *t.shape[1:-2], *size)) for t in inputs))
                    for size in sizes
                ]
        except Exception:  # whatever a network for images of one size raises on others
            return None
        formula = _fitted(np.stack([map_cells(*size) for size in sizes]), policy, costs)
        if formula is not None:
            return multiple, formula
    return None
