"""Description of a network that skips blocks, in ``bundle.json``.

An ONNX file each for the stem, the gates, the blocks and the head; also for the way around a block
where it is more than handing on the features.
"""

from __future__ import annotations

from dataclasses import dataclass

from offramp.decoding import Count, Share
from offramp.runtime.files import OnnxFile, TensorSpec

SKIP_OUTPUTS = ("output", "confidence", "blocks", "macs")
"""Outputs of the file for single samples: logits, confidence, the blocks that ran, and MACs."""


@dataclass(frozen=True, kw_only=True)
class SkipStep:
    """A block that may be skipped, and the gate in front of it.

    Attributes:
        gate: Maps ``(features, state..., threshold)`` to ``(run, probability, state...)``: whether
            each sample wants the block, how likely, and what the next gate is told. The first gate
            is told nothing.
        block: Maps features to features.
        around: The same, for samples that skip the block; None where they keep their features.
        gate_macs: MACs a sample of the gate.
        block_macs: MACs a sample that the block takes more than the way around it.
    """

    gate: OnnxFile
    block: OnnxFile
    around: OnnxFile | None
    gate_macs: Count
    block_macs: Count


@dataclass(frozen=True, kw_only=True)
class SkipParts:
    """A network that skips blocks, part by part.

    Attributes:
        input: What the stem is given.
        stem: Maps the input to features.
        steps: Gates and blocks, in the order in which they run.
        head: Maps features to ``(output, confidence)``.
        threshold: What every gate's probability must reach; an input of the gates, so that another
            one needs no other files.
        fixed_macs: MACs a sample of what always runs: stem, head, and the way around each block.
    """

    input: TensorSpec
    stem: OnnxFile
    steps: tuple[SkipStep, ...]
    head: OnnxFile
    threshold: Share
    fixed_macs: Count

    @property
    def always_macs(self) -> int:
        """MACs a sample of what always runs, gates counted."""
        return self.fixed_macs + sum(step.gate_macs for step in self.steps)

    @property
    def files(self) -> tuple[OnnxFile, ...]:
        """All files."""
        of_steps = [(step.gate, step.block, step.around) for step in self.steps]
        all_files = (self.stem, *(file for files in of_steps for file in files), self.head)
        return tuple(file for file in all_files if file is not None)
