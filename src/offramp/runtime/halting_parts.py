"""Description of a network whose tokens halt, in ``bundle.json``.

An ONNX file each for the embedding, for groups of layers, and for the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from offramp.decoding import Count, Share
from offramp.errors import InvalidArgumentError
from offramp.runtime.files import OnnxFile, TensorSpec

HALTING_OUTPUTS = ("output", "confidence", "tokens")
"""Outputs of the file for single samples: logits, confidence, and the tokens in each step."""


@dataclass(frozen=True, kw_only=True)
class HaltingStep:
    """Layers in a row, behind which tokens that have halted are dropped.

    Attributes:
        file: Maps ``(tokens, total, rows, is_token, places, threshold)`` to ``(tokens, total,
            stays, answer)``. Tokens of all samples lie one after the other, without padding, the
            class token first: ``tokens`` (N, D) and ``total`` (N), the sum of each one's scores.
            For attention they are laid out in rows of B samples of at most T tokens: ``rows``
            (B, T) are their numbers, ``is_token`` (B, T) says where there is one, ``places`` (N)
            are the places in B times T that they come from. ``stays`` (N) says which go on, and
            ``answer`` (B, D) what the class token adds to each sample's answer.
        num_layers: How many layers. Tokens that halt inside are masked until the end.
    """

    file: OnnxFile
    num_layers: Annotated[int, Meta(ge=1)]


@dataclass(frozen=True, kw_only=True)
class HaltingParts:
    """A network whose tokens halt, part by part.

    Attributes:
        inputs: What the embedding is given.
        embed: Maps the inputs to tokens, shape (B, T, D), and which are no padding, (B, T).
        steps: In the order in which they run.
        head: Maps the answer, shape (B, D), to ``(output, confidence)``.
        threshold: What the sum of a token's scores must reach for it to halt; an input of the
            steps, so that another one needs no other files.
        fixed_macs: MACs a sample of embedding and head.
        token_macs: MACs of each layer, for each token in it.
        pair_macs: MACs of each layer, for each pair of tokens in it.
    """

    inputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    embed: OnnxFile
    steps: tuple[HaltingStep, ...]
    head: OnnxFile
    threshold: Share
    fixed_macs: Count
    token_macs: tuple[Count, ...]
    pair_macs: tuple[Count, ...]

    def __post_init__(self) -> None:
        num_layers = sum(step.num_layers for step in self.steps)
        if not num_layers == len(self.token_macs) == len(self.pair_macs):
            raise InvalidArgumentError(
                f"The 'token_macs' and 'pair_macs' parameters must hold {num_layers} numbers, one "
                f"per layer. Got {len(self.token_macs)} and {len(self.pair_macs)}."
            )

    @property
    def files(self) -> tuple[OnnxFile, ...]:
        """All files."""
        return (self.embed, *(step.file for step in self.steps), self.head)

    @property
    def first_layers(self) -> tuple[int, ...]:
        """Number of the layer that each step begins with."""
        counts = [step.num_layers for step in self.steps]
        return tuple(sum(counts[:index]) for index in range(len(counts)))
