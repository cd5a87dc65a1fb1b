"""The steps of a bundle whose tokens halt: each on the tokens that are left, without padding.

Shapes: ``B`` batch, ``T`` tokens of the longest sample, ``N`` tokens of all samples together, ``D``
width of a token, ``L`` layers, ``S`` steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.results import AdaptiveResult
from offramp.runtime.bundle import Bundle
from offramp.runtime.family_steps import FamilySteps
from offramp.runtime.halting_parts import HALTING_OUTPUTS
from offramp.runtime.loading import LoadedFile, Loader
from offramp.runtime.padding import mask_of_inputs, require_first_tokens, trim_tokens

Array = npt.NDArray[Any]

_RUNS_ALONE_MACS = 2e8
"""From so many MACs of the plain network on, each sample of a batch runs alone, as one graph: a
call costs little beside it, and what it computes stays in the cache."""


class HaltingSteps(FamilySteps):
    """Runs step after step on the tokens that have not halted."""

    def __init__(self, bundle: Bundle, loader: Loader) -> None:
        super().__init__(bundle)
        assert bundle.halting is not None  # of this family
        self._parts = parts = bundle.halting
        self._single = loader.single(HALTING_OUTPUTS, {"threshold": parts.threshold})
        self._runs_alone = bundle.plain_macs >= _RUNS_ALONE_MACS
        self._embed = LoadedFile(loader, parts.embed.name)
        self._steps = [LoadedFile(loader, step.file.name) for step in parts.steps]
        self._head = LoadedFile(loader, parts.head.name)
        self._threshold = np.array(parts.threshold, dtype=np.float32)
        self._num_layers_S = np.array([step.num_layers for step in parts.steps])
        self._token_macs_L = np.array(parts.token_macs)
        self._pair_macs_L = np.array(parts.pair_macs)

    def run(self, inputs: list[Array]) -> AdaptiveResult[Array]:
        """Answer a batch."""
        if self._runs_alone and len(inputs[0]) > 1 and self._single is not None:
            samples = zip(*(np.split(tensor, len(tensor)) for tensor in inputs), strict=True)
            answers = zip(*(self._answer(list(sample)) for sample in samples), strict=True)
            output, confidence_B, tokens_BS = (np.concatenate(each) for each in answers)
        else:
            output, confidence_B, tokens_BS = self._answer(inputs)
        tokens_BL = self._in_layers(tokens_BS)
        return AdaptiveResult(
            output=output,
            exit_index=np.zeros(len(output), dtype=np.int64),
            confidence=confidence_B,
            macs=self._macs(tokens_BL),
            tokens=tokens_BL,
        )

    def plain_macs(self, inputs: list[Array]) -> Array:
        """Count each sample by its length, where these differ."""
        if self.bundle.padding is None:
            return super().plain_macs(inputs)
        lengths_B = mask_of_inputs(self.bundle.padding, inputs).sum(1)
        return self._macs(np.repeat(lengths_B[:, None], len(self._token_macs_L), axis=1))

    def _macs(self, tokens_BL: Array) -> Array:
        macs_BL = tokens_BL * (self._token_macs_L + tokens_BL * self._pair_macs_L)
        macs_B: Array = self._parts.fixed_macs + macs_BL.sum(1)
        return macs_B

    def _answer(self, inputs: list[Array]) -> tuple[Array, Array, Array]:
        """Logits, confidence, and the tokens in each step."""
        inputs, has_tokens = self._trimmed(inputs)
        if self._single is not None and len(inputs[0]) == 1 and has_tokens:
            output, confidence_B, tokens_BS = self._single.run(inputs)
            return output, confidence_B, tokens_BS
        return self._run_steps(inputs)

    def run_every_token(self, inputs: list[Array]) -> tuple[Array, Array, Array]:
        """See :meth:`offramp.runtime.Session.run_every_token`."""
        inputs, _ = self._trimmed(inputs)
        x_BTD, is_valid_BT = self._embed.run(*inputs)
        x_ND, total_N = x_BTD.reshape(-1, x_BTD.shape[2]), np.zeros_like(x_BTD[..., 0].ravel())
        rows_BT = np.arange(len(x_ND)).reshape(is_valid_BT.shape)
        places_N = rows_BT.ravel()
        answer_BD, runs_BT = np.zeros((1, 1), x_BTD.dtype), is_valid_BT.copy()
        tokens, margins = [], []
        for step in self._steps:
            tokens.append(runs_BT.sum(1))
            looked_at_BT = runs_BT.copy()
            looked_at_BT[:, 0] = True  # somebody is, even in a sample that is answered
            x_ND, total_N, stays_N, part_BD = step.run(
                x_ND, total_N, rows_BT, looked_at_BT, places_N, self._threshold
            )
            answer_BD = answer_BD + np.where(runs_BT[:, :1], part_BD, 0)
            margin_BT = np.abs(total_N - self._threshold)[rows_BT]
            margins.append(np.where(runs_BT, margin_BT, np.inf).min(1))
            stays_BT = stays_N[rows_BT]
            runs_BT &= stays_BT & stays_BT[:, :1]
        tokens_BL, margin_BL = (self._in_layers(np.stack(each, 1)) for each in (tokens, margins))
        return self._head.run(answer_BD)[0], tokens_BL, margin_BL

    def _trimmed(self, inputs: list[Array]) -> tuple[list[Array], bool]:
        """Inputs without padding that all samples have, and whether anything else is there."""
        padding = self.bundle.padding
        if padding is None:
            return inputs, True
        mask_BT = mask_of_inputs(padding, inputs)
        require_first_tokens(mask_BT)
        return trim_tokens(inputs, self._parts.inputs, mask_BT), bool(mask_BT.any())

    def _in_layers(self, of_steps_BS: Array) -> Array:
        """The same for each layer of a step."""
        of_layers_BL: Array = of_steps_BS.repeat(self._num_layers_S, axis=1)
        return of_layers_BL

    def _run_steps(self, inputs: list[Array]) -> tuple[Array, Array, Array]:
        """Logits, confidence, and the tokens in each step."""
        x_BTD, is_valid_BT = self._embed.run(*inputs)
        answer_BA = np.zeros_like(x_BTD[:, 0])
        tokens_BS = np.zeros((len(x_BTD), len(self._steps)), dtype=np.int64)
        x_ND, lengths_B = x_BTD[is_valid_BT], is_valid_BT.sum(1)
        total_N, numbers_B = np.zeros_like(x_ND[:, 0]), np.arange(len(x_BTD))
        for index, step in enumerate(self._steps):
            is_running_B = lengths_B > 0
            if not is_running_B.any():
                break
            numbers_B, lengths_B = numbers_B[is_running_B], lengths_B[is_running_B]
            tokens_BS[numbers_B, index] = lengths_B
            x_ND, total_N, stays_N, part_BD = step.run(
                x_ND, total_N, *lay_out(lengths_B), self._threshold
            )
            if index == 0:  # as wide as what is read of tokens, which may be more than one
                answer_BA = np.zeros((len(x_BTD), part_BD.shape[1]), part_BD.dtype)
            answer_BA[numbers_B] += part_BD
            if index < len(self._steps) - 1:
                kept_N, lengths_B = _kept(stays_N, lengths_B)
                if not kept_N.all():
                    x_ND, total_N = x_ND[kept_N], total_N[kept_N]
        output, confidence_B = self._head.run(answer_BA)
        return output, confidence_B, tokens_BS


def lay_out(lengths_B: Array) -> tuple[Array, Array, Array]:
    """Places in a padded batch of tokens that lie one after the other, and the way back.

    Example:
        >>> rows, _, places = lay_out(np.array([2, 3]))
        >>> rows.tolist(), places.tolist()
        ([[0, 1, 0], [2, 3, 4]], [0, 1, 3, 4, 5])
    """
    starts_B1 = (lengths_B.cumsum() - lengths_B)[:, None]
    positions_T = np.arange(lengths_B.max())
    is_token_BT: Array = positions_T < lengths_B[:, None]
    rows_BT: Array = starts_B1 + np.where(is_token_BT, positions_T, 0)
    return rows_BT, is_token_BT, np.flatnonzero(is_token_BT)


def _kept(stays_N: Array, lengths_B: Array) -> tuple[Array, Array]:
    """Find the tokens that go on, none of a sample whose class token does not; count each's."""
    ends_B = lengths_B.cumsum()
    goes_on_B = stays_N[ends_B - lengths_B]
    kept_N: Array = stays_N & goes_on_B.repeat(lengths_B)
    counts_B = np.diff(kept_N.cumsum()[ends_B - 1], prepend=0)
    return kept_N, counts_B
