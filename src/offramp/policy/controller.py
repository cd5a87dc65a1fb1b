"""A learned controller: a small network at each exit says what leaving there is worth.

Shapes: ``B`` batch, ``C`` classes, ``S`` what earlier exits said, ``F`` inputs of a scorer, ``H``
its hidden units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.policy.confidence import CONFIDENCE_RULES, max_probability_confidence
from offramp.policy.policies import (
    Decision,
    Setting,
    State,
    ThresholdedPolicy,
    checked_thresholds,
)

_RULES = tuple(CONFIDENCE_RULES)
"""Confidence functions that a scorer sees of each exit, in this order."""

_LEAST_DOUBT = 1e-3
"""Added to a doubt before its logarithm: surer than this is all the same."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExitScorer:
    """The small network of one exit: one hidden layer, and a way past it.

    Inputs are standardised; what is not known (NaN) then counts as the mean.
    """

    mean_F: Tensor
    scale_F: Tensor
    hidden_FH: Tensor
    hidden_bias_H: Tensor
    direct_F: Tensor
    score_H: Tensor
    score_bias: Tensor

    def __post_init__(self) -> None:
        if self.hidden_FH.ndim != 2:
            raise InvalidArgumentError(
                "The 'hidden_FH' parameter must be of shape (F, H). "
                f"Got {tuple(self.hidden_FH.shape)}."
            )
        of_inputs, of_hidden = self.hidden_FH.shape[:1], self.hidden_FH.shape[1:]
        expected = {
            "mean_F": of_inputs,
            "scale_F": of_inputs,
            "hidden_bias_H": of_hidden,
            "direct_F": of_inputs,
            "score_H": of_hidden,
            "score_bias": (),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise InvalidArgumentError(
                    f"The '{name}' parameter must be of shape {tuple(shape)}. "
                    f"Got {tuple(getattr(self, name).shape)}."
                )
        is_finite = all(bool(tensor.isfinite().all()) for tensor in self.tensors.values())
        if not is_finite or not bool((self.scale_F > 0).all()):
            raise InvalidArgumentError(
                "A scorer needs finite numbers and positive scales. Got others."
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExitScorer):
            return NotImplemented
        theirs = other.tensors
        return all(torch.equal(mine, theirs[name]) for name, mine in self.tensors.items())

    def __hash__(self) -> int:
        return hash((self.hidden_FH.shape, float(self.score_bias)))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All numbers, by the name of their parameter."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        num_inputs, num_hidden = self.hidden_FH.shape
        return num_inputs * num_hidden + num_hidden + num_inputs

    def score(self, inputs_BF: Tensor) -> Tensor:
        """Say how much better it is to leave than to go on."""
        own = {name: tensor.to(inputs_BF.device) for name, tensor in self.tensors.items()}
        z_BF = (inputs_BF - own["mean_F"]) / own["scale_F"]
        z_BF = z_BF.masked_fill(z_BF.isnan(), 0.0)
        hidden_BH = (z_BF @ own["hidden_FH"] + own["hidden_bias_H"]).tanh()
        # Sums, not products with a vector, which onnxruntime's int8 weights per channel break.
        by_hidden_B = (hidden_BH * own["score_H"]).sum(-1)
        return by_hidden_B + (z_BF * own["direct_F"]).sum(-1) + own["score_bias"]


@dataclass(frozen=True)
class ControllerPolicy(ThresholdedPolicy):
    """Leave at exit k as soon as what its scorer expects of leaving reaches ``thresholds[k]``.

    A scorer sees the class probabilities of its exit, three confidences of this and of all earlier
    exits, and whether the exit before agrees. Its score s, the advantage of leaving over going on,
    becomes a confidence ``(1 + tanh s) / 2``: where a threshold is 0.5, a sample leaves as soon as
    leaving is the better deal at the price that the scorers were fitted with.

    Exits that are off, or say NaN, are not known to those after them.

    Args:
        thresholds: One per exit but the final one, each in [0, 1], or +inf to switch the exit off.
        scorers: One per exit but the final one.
    Raises:
        InvalidArgumentError: If a threshold is NaN or outside [0, 1] and not +inf, or there is not
            one scorer per threshold, each with the inputs that its exit has.
    Reference: Ilhan et al. (2024), EENet: scorers on class scores, confidences and earlier scores,
        trained for accuracy at a budget; there jointly, by gradients through soft exit shares, and
        not from the last exit backwards. Regol et al. (2024), JEI-DNN: a gate per exit that weighs
        the loss of leaving there against that of going on, with a price for compute; there trained
        with the heads.
    """

    needs_every_exit: ClassVar[bool] = True

    thresholds: tuple[float, ...]
    scorers: tuple[ExitScorer, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", checked_thresholds(self.thresholds))
        object.__setattr__(self, "scorers", tuple(self.scorers))
        if len(self.scorers) != len(self.thresholds):
            raise InvalidArgumentError(
                f"The 'scorers' parameter must hold {len(self.thresholds)} scorers, one per "
                f"threshold. Got {len(self.scorers)}."
            )
        for k, scorer in enumerate(self.scorers):
            num_inputs = count_inputs(k, num_classes=self._num_classes)
            if self._num_classes < 2 or len(scorer.mean_F) != num_inputs:
                raise InvalidArgumentError(
                    f"The scorer of exit {k} must have {num_inputs} inputs, as many classes as "
                    f"that of exit 0, at least 2. Got {len(scorer.mean_F)}."
                )

    @property
    def num_exits(self) -> int:  # type: ignore[override]
        """Exits of the network it is for, the final one counted."""
        return len(self.thresholds) + 1

    @property
    def _num_classes(self) -> int:
        return len(self.scorers[0].mean_F) - count_inputs(0, num_classes=0)

    def decide(self, exit_index: int, output: Tensor, state: State, setting: Setting) -> Decision:
        """See :meth:`Policy.decide`; the state is that of :func:`scorer_inputs`."""
        output = output.float() / setting.temperature
        if exit_index == len(self.scorers):
            confidence_B = max_probability_confidence(output)
            return torch.ones_like(confidence_B, dtype=torch.bool), confidence_B, state
        if output.shape[-1] != self._num_classes:
            raise ShapeError(
                f"Expected logits of {self._num_classes} classes, which the scorers were fitted "
                f"on. Got shape {tuple(output.shape)}."
            )
        inputs_BF, state = scorer_inputs(exit_index, output, state, num_early=len(self.scorers))
        advantage_B = self.scorers[exit_index].score(inputs_BF)
        confidence_B = ((1 + advantage_B.tanh()) / 2).masked_fill(_is_nan(output), math.nan)
        return confidence_B >= setting.threshold, confidence_B, state

    def macs(self, exit_index: int) -> int:
        """See :meth:`Policy.macs`; those of the exit's scorer."""
        return 0 if exit_index == len(self.scorers) else self.scorers[exit_index].macs


def scorer_inputs(
    exit_index: int, logits_BC: Tensor, state: State, *, num_early: int
) -> tuple[Tensor, State]:
    """Make what the scorer of an exit sees, and the state after it.

    Confidences come twice, as they are and as the logarithm of what they lack to 1, which parts
    the sure from the very sure.
    """
    p_BC = logits_BC.softmax(-1)
    own_B3 = torch.stack([CONFIDENCE_RULES[rule](logits_BC) for rule in _RULES], -1)
    if state:
        last_p_BC, known_BS = state
    else:
        unknown = p_BC.new_full((p_BC.shape[0], len(_RULES) * num_early), math.nan)
        last_p_BC, known_BS = torch.full_like(p_BC, math.nan), unknown
    before = len(_RULES) * exit_index
    seen_BS = torch.cat([known_BS[:, :before], own_B3], 1)
    parts = [p_BC, seen_BS, -(1 - seen_BS + _LEAST_DOUBT).log()]
    if exit_index > 0:
        agreement_B1 = (p_BC * last_p_BC).sum(-1, keepdim=True)
        parts += [agreement_B1, last_p_BC.gather(1, p_BC.argmax(-1, keepdim=True))]
    known_BS = torch.cat([seen_BS, known_BS[:, before + len(_RULES) :]], 1)
    return torch.cat(parts, 1), (p_BC, known_BS)


def count_inputs(exit_index: int, *, num_classes: int) -> int:
    """Count the numbers that :func:`scorer_inputs` makes."""
    agreements = 0 if exit_index == 0 else 2
    return num_classes + 2 * len(_RULES) * (exit_index + 1) + agreements


def _is_nan(output: Tensor) -> Tensor:
    return output.softmax(-1).isnan().any(-1)
