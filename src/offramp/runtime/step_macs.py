"""MACs of samples by the exit that they left by, as ``bundle.json`` counts them.

Shapes: ``B`` batch, ``S`` steps, ``K`` exits, ``P`` numbers that MACs are made of.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from offramp.runtime.bundle import Bundle, Step
from offramp.runtime.dense import map_cells
from offramp.runtime.padding import mask_of_inputs, trim_tokens

Array = npt.NDArray[Any]
Measured = Array | tuple[int, ...]
"""Sizes that MACs go by: tokens of each sample, shape (B,), or the images' height and width."""


class MeanMacs(NamedTuple):
    """MACs of the mean sample, to the nearest MAC.

    Attributes:
        stages: Of the stages of each step.
        heads: Of the exit head of each step, with its decision.
    """

    stages: tuple[int, ...]
    heads: tuple[int, ...]


class StepMacs:
    """MACs of the samples of a bundle with exits."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        exit_SP = np.array([_exit_numbers(bundle, step) for step in bundle.steps])
        self._exit_KP = np.zeros((bundle.num_exits, exit_SP.shape[1]), dtype=exit_SP.dtype)
        self._exit_KP[[step.exit_index for step in bundle.steps]] = exit_SP
        step_SP = np.diff(exit_SP, axis=0, prepend=0)
        stages = [_stage_numbers(bundle, step) for step in bundle.steps]
        self._stage_SP = np.array(
            [
                # A bundle of before does not say: then the head costs all samples the same.
                step_P - step.head_macs * _first_only(step_P) if stage is None else stage
                for step, step_P, stage in zip(bundle.steps, step_SP, stages, strict=True)
            ]
        )
        self._head_SP = step_SP - self._stage_SP

    def trim(self, inputs: list[Array]) -> tuple[list[Array], Measured]:
        """Cut off the padding that all samples have, and measure what MACs go by."""
        padding = self._bundle.padding
        if padding is None:
            return inputs, inputs[0].shape[2:]
        mask_BT = mask_of_inputs(padding, inputs)
        return trim_tokens(inputs, self._bundle.inputs, mask_BT), mask_BT.sum(1)

    def of_exits(self, exit_index_B: Array, measured: Measured) -> Array:
        """MACs of each sample by the exit that it left by, shape (B,), int64."""
        macs_B: Array = (self._exit_KP[exit_index_B] * self._basis(measured)).sum(1)
        return macs_B

    def of_plain(self, measured: Measured) -> Array:
        """MACs of each sample in the plain network, shape (B,), or (1,) where all cost the same."""
        plain_P = self._stage_SP.sum(0) + self._head_SP[-1]
        macs_B: Array = (self._basis(measured) * plain_P).sum(1)
        return macs_B

    def mean(self, measured: Measured) -> MeanMacs:
        """MACs of the mean of some samples, step by step."""
        mean_P = self._basis(measured).mean(0)
        stages, heads = (
            tuple((numbers_SP @ mean_P).round().astype(np.int64).tolist())
            for numbers_SP in (self._stage_SP, self._head_SP)
        )
        return MeanMacs(stages, heads)

    def _basis(self, measured: Measured) -> Array:
        """Factors of the numbers, shape (B, P), or (1, P) for all samples."""
        if self._bundle.pixel_multiple is not None:
            height, width = measured
            return map_cells(int(height), int(width))[None]
        if self._bundle.padding is None:
            return np.ones((1, 1), dtype=np.int64)
        powers: Array = np.asarray(measured)[:, None] ** np.arange(3)
        return powers


def _exit_numbers(bundle: Bundle, step: Step) -> tuple[int, ...]:
    if bundle.pixel_multiple is not None:
        return _written(step.exit_macs_by_size)
    if bundle.padding is not None:
        return _written(step.exit_macs_by_length)
    return (step.exit_macs,)


def _stage_numbers(bundle: Bundle, step: Step) -> tuple[int, ...] | None:
    if bundle.pixel_multiple is not None:
        return step.stage_macs_by_size
    return (step.stage_macs,) if bundle.padding is None else step.stage_macs_by_length


def _written(numbers: tuple[int, ...] | None) -> tuple[int, ...]:
    assert numbers is not None  # an exporter writes them for all such bundles
    return numbers


def _first_only(numbers_P: Array) -> Array:
    """1, then zeros: the number that counts once a sample."""
    first_P: Array = np.eye(len(numbers_P), dtype=np.int64)[0]
    return first_P
