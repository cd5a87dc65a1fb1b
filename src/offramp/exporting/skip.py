"""Bundles of networks that skip blocks: a file a gate and a block, and one for batches of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from onnx import TensorProto
from torch import Tensor

from offramp.exporting.graph import Graph
from offramp.exporting.onnx import PLAIN, THRESHOLD, tensor_specs
from offramp.exporting.parts import Part
from offramp.families.skip import gated_sum
from offramp.measure.agreement import Reference
from offramp.model.multi_exit import Features
from offramp.policy.confidence import max_probability_confidence
from offramp.routing.gates import GateState
from offramp.routing.skip import SkipNetwork, runs_block
from offramp.runtime import Bundle
from offramp.runtime.files import OnnxFile, TensorSpec
from offramp.runtime.skip_parts import SKIP_OUTPUTS, SkipParts, SkipStep

_FEATURES = "features"
_NEXT_FEATURES = "next_features"
_AXES_OF_MAPS = 4
_ABOVE_ALL = 2.0
"""A threshold that no probability reaches: some may round to 1 in one engine and not in another."""


def join_skip(graph: Graph, bundle: Bundle) -> dict[str, str]:
    """Gates lie outside, one after the other; each block lies inside an ``If``.

    A small network's gates take longer than their sums do: every node costs about a microsecond,
    so that there shall be few.
    """
    parts = bundle.skip
    assert parts is not None
    graph.number(THRESHOLD, parts.threshold)
    (x,) = graph.add(parts.stem.name, graph.take_inputs(parts.stem.name))
    state: list[str] = []
    skips = []
    for step in parts.steps:
        run, _, *state = graph.add(step.gate.name, [x, *state, THRESHOLD])
        skips.append(graph.opposite(run))
        (x,) = graph.choose(skips[-1], partial(_go_around, step, x), partial(_run, step, x))
    output, confidence = graph.add(parts.head.name, [x])
    in_a_row = graph.node("Concat", skips, axis=0)
    blocks = graph.node("Not", [graph.node("Unsqueeze", [in_a_row, graph.constant([0])])])
    # numpy would take 20 microseconds for the MACs.
    ran = graph.node("Cast", [blocks], to=TensorProto.INT64)
    block_macs = graph.constant([step.block_macs for step in parts.steps])
    macs = graph.node("MatMul", [ran, block_macs])
    macs = graph.node("Add", [macs, graph.constant([parts.always_macs])])
    graph.declare(blocks, TensorProto.BOOL, [1, len(skips)])
    graph.declare(macs, TensorProto.INT64, [1])
    return dict(zip(SKIP_OUTPUTS, (output, confidence, blocks, macs), strict=True))


def _go_around(step: SkipStep, x: str, branch: Graph) -> Sequence[str]:
    return [x] if step.around is None else branch.add(step.around.name, [x])


def _run(step: SkipStep, x: str, branch: Graph) -> Sequence[str]:
    if step.around is None and branch.num_axes(step.block.name) == _AXES_OF_MAPS:
        # Only what one of its own operations puts out does onnxruntime keep in its layout, and add
        # within a convolution. Pooling single pixels is such an operation, and changes nothing.
        x = branch.node("MaxPool", [x], kernel_shape=[1, 1])
    return branch.add(step.block.name, [x])


@dataclass(frozen=True)
class SkipExport:
    """A network that skips blocks, and how likely a gate must be to run its block.

    Attributes:
        network: The network, in evaluation mode, on the CPU.
        inputs: Samples to export with.
        threshold: What a gate's probability must reach for its block to run.
    """

    network: SkipNetwork
    inputs: Features
    threshold: float

    def parts(self) -> dict[str, Part]:
        """Stem, gates, blocks, ways around them and head, each with an example of its inputs."""
        (spec,) = tensor_specs(self.inputs)
        image = self.inputs[0][:1]
        return {
            **_parts_of(self.network, image, spec),
            PLAIN: Part(
                call=self.network.plain(),
                example=(image,),
                input_names=(spec.name,),
                output_names=("output",),
            ),
        }

    def describe(self, files: Mapping[str, OnnxFile]) -> dict[str, Any]:
        """Describe the network for ``bundle.json``."""
        (spec,) = tensor_specs(self.inputs)
        costs = self.network.costs(*self.inputs)
        skip = SkipParts(
            input=spec,
            stem=files["stem"],
            steps=tuple(
                SkipStep(
                    gate=files[f"gate_{k}"],
                    block=files[f"block_{k}"],
                    around=files.get(f"around_{k}"),
                    gate_macs=costs.gate_macs[k],
                    block_macs=costs.block_macs[k],
                )
                for k in range(self.network.num_gates)
            ),
            head=files["head"],
            threshold=self.threshold,
            fixed_macs=costs.fixed_macs,
        )
        return {"steps": (), "skip": skip, "plain_macs": costs.plain_macs}

    join = staticmethod(join_skip)

    def reference(self, inputs: Features) -> Reference:
        """Compute the expected answers: the gated sum, which computes every block."""
        return gated_sum(self.network, self.threshold, inputs)

    def extremes(self, bundle: Bundle) -> list[tuple[Bundle, SkipExport]]:
        """The bundle at thresholds that run every part of it: all blocks, then ways around."""
        assert bundle.skip is not None
        return [
            (
                replace(bundle, skip=replace(bundle.skip, threshold=threshold)),
                replace(self, threshold=threshold),
            )
            for threshold in (0.0, _ABOVE_ALL)
        ]


def _parts_of(network: SkipNetwork, image: Tensor, spec: TensorSpec) -> dict[str, Part]:
    x = network.stem(image)
    parts = {
        "stem": Part(
            call=network.stem,
            example=(image,),
            input_names=(spec.name,),
            output_names=(_NEXT_FEATURES,),
        )
    }
    state: GateState = ()
    for k in range(network.num_gates):
        _, next_state = network.ask(k, x, state)
        parts[f"gate_{k}"] = Part(
            call=partial(_decide, network, k),
            example=(x, *state),
            scalars=(THRESHOLD,),
            input_names=(_FEATURES, *(f"state_{i}" for i in range(len(state)))),
            output_names=(
                "run",
                "probability",
                *(f"next_state_{i}" for i in range(len(next_state))),
            ),
        )
        parts[f"block_{k}"] = _way(partial(network.run_block, k), x)
        if network.skip_block(k, x) is not x:
            parts[f"around_{k}"] = _way(partial(network.skip_block, k), x)
        x, state = network.run_block(k, x), next_state
    parts["head"] = Part(
        call=partial(_answer, network),
        example=(x,),
        input_names=(_FEATURES,),
        output_names=("output", "confidence"),
    )
    return parts


def _way(call: Callable[[Tensor], Tensor], x: Tensor) -> Part:
    """A block, or the way around it."""
    return Part(call=call, example=(x,), input_names=(_FEATURES,), output_names=(_NEXT_FEATURES,))


def _decide(network: SkipNetwork, index: int, x: Tensor, *state_and_threshold: Tensor) -> Features:
    """A gate and what follows from it, as the runner in torch has it."""
    *state, threshold = state_and_threshold
    probability_B, next_state = network.ask(index, x, tuple(state))
    # The threshold comes in as float32. Were it cast to double here, onnxruntime would fold that
    # in the file for single samples, and take no other threshold any more.
    return runs_block(probability_B.float(), threshold), probability_B, *next_state


def _answer(network: SkipNetwork, x: Tensor) -> Features:
    logits_BC = network.head(x)
    return logits_BC, max_probability_confidence(logits_BC)
