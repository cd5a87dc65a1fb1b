"""Bundles of networks that skip blocks: a file a gate and a block, and one for batches of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from offramp.exporting.onnx import PLAIN_FILE, SINGLE_FILE, tensor_specs
from offramp.exporting.parts import Part, write_parts
from offramp.exporting.skip_single import THRESHOLD, write_skip_single
from offramp.families.agreement import Reference
from offramp.families.skip import gated_sum
from offramp.model.multi_exit import Features
from offramp.policy.confidence import max_probability_confidence
from offramp.routing.gates import GateState
from offramp.routing.skip import SkipNetwork, runs_block
from offramp.runtime import Bundle
from offramp.runtime.files import TensorSpec, file_sha256
from offramp.runtime.skip_parts import SkipParts, SkipStep

_FEATURES = "features"
_NEXT_FEATURES = "next_features"
_ABOVE_ALL = 2.0
"""A threshold that no probability reaches: some may round to 1 in one engine and not in another."""


@dataclass(frozen=True)
class SkipExport:
    """A network that skips blocks, and how likely a gate must be to run its block.

    Attributes:
        network: The network, in evaluation mode, on the CPU.
        threshold: What a gate's probability must reach for its block to run.
    """

    family: ClassVar[str] = "skip"

    network: SkipNetwork
    threshold: float

    def write_files(self, inputs: Features, folder: Path, *, plain: bool) -> dict[str, Any]:
        """Write the ONNX files."""
        (images,) = inputs
        (spec,) = tensor_specs((images,))
        parts = _parts_of(self.network, images[:1], spec)
        if plain:
            parts[Path(PLAIN_FILE).stem] = Part(
                call=self.network.plain(),
                example=(images[:1],),
                input_names=(spec.name,),
                output_names=("output",),
            )
        files = write_parts(self.network, parts, folder)
        costs = self.network.costs(images)
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
        write_skip_single(folder, skip, folder / SINGLE_FILE)
        plain_file = files.get(Path(PLAIN_FILE).stem)
        return {
            "steps": (),
            "skip": skip,
            "plain_file": None if plain_file is None else plain_file.name,
            "plain_sha256": None if plain_file is None else plain_file.sha256,
            "plain_macs": costs.plain_macs,
            "single_file": SINGLE_FILE,
            "single_sha256": file_sha256(folder / SINGLE_FILE),
        }

    def reference(self, inputs: Features) -> Reference:
        """What the bundle must answer: the gated sum, which computes every block."""
        return gated_sum(self.network, self.threshold, inputs)

    def extremes(self, bundle: Bundle) -> list[tuple[Bundle, SkipExport]]:
        """The bundle at thresholds that run every part of it: all blocks, then ways around."""
        assert bundle.skip is not None
        return [
            (
                replace(bundle, skip=replace(bundle.skip, threshold=threshold)),
                SkipExport(self.network, threshold),
            )
            for threshold in (0.0, _ABOVE_ALL)
        ]


def _parts_of(network: SkipNetwork, image: Tensor, spec: TensorSpec) -> dict[str, Part]:
    """Stem, gates, blocks, ways around them and head, each with an example of what it is given."""
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
