"""Bundles of networks with exits: a file a step, and one with all steps for batches of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from offramp.errors import ArtifactError
from offramp.exporting.onnx import (
    PLAIN_FILE,
    SINGLE_FILE,
    StepModule,
    StepPlan,
    plan_steps,
    tensor_specs,
    write_onnx,
)
from offramp.exporting.single import write_single
from offramp.families.agreement import Reference
from offramp.families.exits import EXITS
from offramp.measure.cost import ExitCosts, parameter_bytes, payload_bytes
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.offload.codec import channel_scales
from offramp.policy.policies import Policy, State, ThresholdedPolicy, never_leave
from offramp.runtime import Bundle, Step, with_thresholds
from offramp.runtime.bundle import Padding
from offramp.runtime.dense import map_cells
from offramp.runtime.files import file_sha256

Array = npt.NDArray[Any]

_LENGTHS = (8, 16, 32)
"""In tokens: where the MACs of samples of unequal length are counted."""

_SIZES = ((8, 8), (9, 8), (10, 11), (12, 16), (13, 9), (16, 9), (17, 25), (21, 15))
"""In multiples of what images may measure: where the MACs of images of any size are counted."""


@dataclass(frozen=True)
class ExitsExport:
    """A network with exits, and who leaves where.

    Attributes:
        network: The network, in evaluation mode, on the CPU.
        policy: Its policy.
    """

    family: ClassVar[str] = "exits"

    network: MultiExitNetwork
    policy: Policy

    def write_files(self, inputs: Features, folder: Path, *, plain: bool) -> dict[str, Any]:
        """Write the ONNX files."""
        network, policy = self.network, self.policy
        costs = network.costs(*inputs).with_decisions(policy.decision_macs)
        by_size = _macs_by_size(network, policy, inputs)
        steps = _write_steps(network, policy, inputs, costs, folder, by_size)
        write_single(folder, steps, folder / SINGLE_FILE)
        return {
            "steps": steps,
            "plain_file": PLAIN_FILE if plain else None,
            "plain_sha256": (
                _write_plain(network, inputs, folder, free_pixels=by_size is not None)
                if plain
                else None
            ),
            "plain_macs": costs.plain_macs,
            "single_file": SINGLE_FILE,
            "single_sha256": file_sha256(folder / SINGLE_FILE),
            "padding": None if network.ragged is None else Padding(**asdict(network.ragged)),
            "pixel_multiple": None if by_size is None else network.pixel_multiple,
        }

    def reference(self, inputs: Features) -> Reference:
        """What the bundle must answer: the all-exits loop."""
        return EXITS.reference(self.network, self.policy, inputs)

    def extremes(self, bundle: Bundle) -> list[tuple[Bundle, ExitsExport]]:
        """The bundle at thresholds that run every part of it: nobody leaves."""
        nobody = with_thresholds(bundle, [math.inf] * (len(bundle.steps) - 1))
        stays = self.policy
        if isinstance(stays, ThresholdedPolicy):
            stays = stays.with_thresholds([math.inf] * (self.network.num_exits - 1))
        else:
            stays = never_leave(self.network.num_exits)
        return [(nobody, ExitsExport(self.network, stays))]


def _write_steps(
    network: MultiExitNetwork,
    policy: Policy,
    inputs: Features,
    costs: ExitCosts,
    folder: Path,
    by_size: _Formula | None,
) -> tuple[Step, ...]:
    exit_macs = costs.exit_macs(policy.off_exits)
    by_length = _macs_by_length(network, policy, inputs)
    features = _first_sample(network, inputs)
    num_tokens = None if network.ragged is None else features[0].shape[1]
    state: State = ()
    scales = _channel_scales(network, inputs)
    counts_pixels = "pixel_threshold" in policy.number_names
    steps = []
    for plan in plan_steps(policy):
        k, is_last = plan.exit_index, plan.exit_index == network.num_exits - 1
        setting = policy.setting(k)
        module = StepModule(network, policy, plan, num_features=len(features)).eval()
        next_features = features
        for stage in plan.stages:
            next_features = network.run_stage(stage, next_features)
        _, _, next_state = policy.step(k, network.run_exit(k, next_features), state)
        specs = tensor_specs(features, state, num_tokens, free_pixels=by_size is not None)
        handed_on = () if is_last else tensor_specs(next_features, next_state, num_tokens)
        path = folder / f"step_{k}.onnx"
        write_onnx(
            module,
            (*features, *state),
            path,
            scalars=policy.number_names,
            input_names=[spec.name for spec in specs],
            output_names=["output", "confidence", "leave", *(f"next_{s.name}" for s in handed_on)],
            free_tokens=[spec.has_tokens for spec in specs],
            free_pixels=by_size is not None,
        )
        steps.append(
            Step(
                file=path.name,
                sha256=file_sha256(path),
                exit_index=k,
                temperature=float(setting.temperature),
                threshold=float(setting.threshold),
                features=specs[: len(features)],
                state=specs[len(features) :],
                stage_macs=sum(costs.stage_macs[stage] for stage in plan.stages),
                head_macs=costs.head_macs[k],
                exit_macs=exit_macs[k],
                payload_bytes=0 if is_last else payload_bytes(*next_features, *next_state),
                parameter_bytes=parameter_bytes(module),
                **_by("length", by_length, plan),
                **_by("size", by_size, plan),
                pixel_threshold=float(setting.pixel_threshold) if counts_pixels else None,
                channel_scales=scales[plan.stages[0]],
            )
        )
        features, state = next_features, next_state
    return tuple(steps)


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
    fitted = []
    for macs in (np.array(exits), np.array(stages)):
        numbers = np.linalg.lstsq(basis, macs, rcond=None)[0].round().astype(np.int64)
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
    costs = [network.costs_at(length, inputs) for length in _LENGTHS]
    formula = _fitted(np.vander(_LENGTHS, 3, increasing=True), policy, costs)
    if formula is None:
        raise ArtifactError(
            "The MACs of this network are no polynomial of degree 2 in its tokens, which a bundle "
            "could write down. Run it with torch."
        )
    return formula


def _macs_by_size(network: MultiExitNetwork, policy: Policy, inputs: Features) -> _Formula | None:
    """MACs up to each exit by the cells of feature maps; None where images have one size only.

    That is so too where maps are no whole parts of the image, as in a network that scales it.
    """
    if network.pixel_multiple is None:
        return None
    sizes = [tuple(network.pixel_multiple * n for n in size) for size in _SIZES]
    try:
        with redirect_stderr(StringIO()):  # torch.fx prints where a graph failed
            costs = [
                network.costs(*(t.new_zeros((1, *t.shape[1:-2], *size)) for t in inputs))
                for size in sizes
            ]
    except Exception:  # whatever a network for images of one size raises on others
        return None
    return _fitted(np.stack([map_cells(*size) for size in sizes]), policy, costs)


def _write_plain(
    network: MultiExitNetwork, inputs: Features, folder: Path, *, free_pixels: bool
) -> str:
    path = folder / PLAIN_FILE
    plain = network.plain().eval()
    example = _first_sample(network, inputs)
    num_tokens = None if network.ragged is None else example[0].shape[1]
    specs = tensor_specs(example, (), num_tokens, free_pixels=free_pixels)
    write_onnx(
        plain,
        example,
        path,
        input_names=[spec.name for spec in specs],
        output_names=["output"],
        free_tokens=[spec.has_tokens for spec in specs],
        free_pixels=free_pixels,
    )
    return file_sha256(path)
