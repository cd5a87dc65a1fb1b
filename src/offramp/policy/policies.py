"""Policies: who leaves at which exit. They see logits only, never a network or a clock.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from msgspec import Meta
from typing_extensions import Self

from offramp.errors import InvalidArgumentError
from offramp.policy.confidence import CONFIDENCE_RULES, confidence_from_entropy_nats

if TYPE_CHECKING:  # deciding takes torch, and naming a policy does not
    from torch import Tensor

State = tuple[Any, ...]
"""Memory of a policy about each sample: tensors with their batch axis first."""

Decision = tuple[Any, Any, State]
"""Leavers, shape (B,), bool; each sample's confidence, shape (B,); the state after that."""


class Setting(NamedTuple):
    """The numbers that calibration chooses at an exit; scalar tensors while a stage is exported.

    Attributes:
        temperature: Divides the logits before the confidence is taken, positive.
        threshold: What a policy compares with; +inf where nobody can leave, so that the head need
            not run. The final exit's is never +inf.
        pixel_threshold: How sure a pixel must be to count as sure, where pixels are counted.
    """

    temperature: float | Tensor = 1.0
    threshold: float | Tensor = 0.0
    pixel_threshold: float | Tensor = 0.0


class Policy(ABC):
    """Decides, exit by exit, which samples leave.

    Attributes:
        num_exits: Exits of the network it is for; the last one accepts every sample.
    """

    num_exits: int

    @abstractmethod
    def decide(self, exit_index: int, output: Tensor, state: State, setting: Setting) -> Decision:
        """Decide for the samples that reached an exit, by numbers that are given.

        Written in torch operations only: an exported stage holds them, with the setting as an
        input, so that calibrating anew needs no new export.

        Args:
            exit_index: Number of the exit, from 0.
            output: Raw logits of that exit, shape (B, C), float.
            state: What the previous step returned, rows of samples that left taken out; the
                empty tuple at the first exit.
            setting: What :meth:`setting` says of this exit.
        Returns:
            leave: Shape (B,), bool; all True at the final exit, never True for NaN before it.
            confidence: Shape (B,), float in [0, 1].
            state: For the next exit.
        """

    def setting(self, exit_index: int) -> Setting:
        """The policy's own numbers at an exit; temperature 1 and threshold 0 by default.

        Args:
            exit_index: Number of the exit, from 0.
        Returns:
            Plain numbers.
        """
        return Setting()

    def step(self, exit_index: int, output: Tensor, state: State) -> Decision:
        """Decide for the samples that reached an exit, by the policy's own numbers.

        Args:
            exit_index: Number of the exit, from 0.
            output: As for :meth:`decide`.
            state: As for :meth:`decide`.
        Returns:
            As :meth:`decide`.
        """
        return self.decide(exit_index, output, state, self.setting(exit_index))

    def is_off(self, exit_index: int) -> bool:
        """Tell if nobody can leave at this exit, so that its head need not run.

        Args:
            exit_index: Number of the exit, from 0.
        Returns:
            True if the exit is switched off.
        """
        return float(self.setting(exit_index).threshold) == math.inf

    def macs(self, exit_index: int) -> int:
        """Multiply-accumulates that deciding about one sample takes; element-wise work is free.

        Args:
            exit_index: Number of the exit, from 0; the final one decides nothing.
        Returns:
            0 by default.
        """
        return 0

    @property
    def number_names(self) -> tuple[str, ...]:
        """The fields of a setting that :meth:`decide` reads: inputs of an exported stage."""
        return ("temperature", "threshold")

    @property
    def decision_macs(self) -> tuple[int, ...]:
        """MACs of each exit, as :meth:`macs` counts them."""
        return tuple(self.macs(k) for k in range(self.num_exits))

    @property
    def off_exits(self) -> frozenset[int]:
        """Numbers of the exits that are off."""
        return frozenset(k for k in range(self.num_exits) if self.is_off(k))


class ThresholdedPolicy(Policy):
    """Decides by a confidence and one threshold per exit, which calibration chooses.

    A sample that is allowed to leave leaves where its confidence reaches the threshold. Policies of
    this kind are frozen dataclasses with a field ``thresholds``.

    Attributes:
        thresholds: One per exit but the final one, each in [0, 1], or +inf to switch the exit off.
        temperatures: Divide each exit's logits, the final one counted; None for 1 everywhere.
        takes_temperatures: Whether they may be set: they change what the policy goes by.
        needs_every_exit: Whether an exit's decision suffers when an earlier exit is off; then
            calibration switches off all exits or none.
    """

    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...] | None = None
    takes_temperatures: ClassVar[bool] = False
    needs_every_exit: ClassVar[bool] = False

    def setting(self, exit_index: int) -> Setting:
        """See :meth:`Policy.setting`; the final exit's threshold is 0."""
        temperature = 1.0 if self.temperatures is None else self.temperatures[exit_index]
        return Setting(temperature, (*self.thresholds, 0.0)[exit_index])

    def with_thresholds(self, thresholds: Sequence[float]) -> Self:
        """The same policy with other thresholds.

        Args:
            thresholds: One per exit but the final one.
        Returns:
            A new policy; what else it holds is shared.
        Raises:
            InvalidArgumentError: If a threshold is NaN or outside [0, 1] and not +inf.
        """
        return replace(self, thresholds=tuple(thresholds))  # type: ignore[type-var]


@dataclass(frozen=True)
class ThresholdPolicy(ThresholdedPolicy):
    """Leave at exit k as soon as the confidence reaches ``thresholds[k]``.

    Args:
        thresholds: One per exit but the final one, each in [0, 1], or +inf to switch the exit off.
        rule: Name of the confidence function: entropy, max_probability or margin.
        temperatures: Divide each exit's logits before its confidence is taken, one per exit,
            the final one counted; all 1 if None.
    Raises:
        InvalidArgumentError: If a threshold is NaN or outside [0, 1] and not +inf, the rule is
            unknown, or there is not one positive temperature per exit.
    Example:
        >>> policy = ThresholdPolicy((0.9, float("inf")), rule="max_probability")
        >>> policy.num_exits, policy.is_off(1)
        (3, True)
    """

    takes_temperatures: ClassVar[bool] = True

    thresholds: tuple[float, ...]
    rule: str = "entropy"
    temperatures: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", checked_thresholds(self.thresholds))
        check_rule(self.rule)
        temperatures = checked_temperatures(self.temperatures, num_exits=self.num_exits)
        object.__setattr__(self, "temperatures", temperatures)

    @classmethod
    def from_entropy_nats(
        cls, thresholds_nats: Sequence[float], *, num_classes: int
    ) -> ThresholdPolicy:
        """Leave at exit k as soon as the entropy is at most ``thresholds_nats[k]``.

        Args:
            thresholds_nats: Entropy thresholds in nats, one per exit but the final one.
            num_classes: Number of classes.
        Returns:
            The same rule as confidence thresholds.
        Raises:
            InvalidArgumentError: If a threshold is NaN or outside [0, log C].
        """
        return cls(tuple(confidence_from_entropy_nats(t, num_classes) for t in thresholds_nats))

    @property
    def num_exits(self) -> int:  # type: ignore[override]
        """Exits of the network it is for, the final one counted."""
        return len(self.thresholds) + 1

    def decide(self, exit_index: int, output: Tensor, state: State, setting: Setting) -> Decision:
        """See :meth:`Policy.decide`; keeps no state."""
        import torch

        confidence_B = CONFIDENCE_RULES[self.rule](tempered(output, setting))
        if exit_index == len(self.thresholds):
            return torch.ones_like(confidence_B, dtype=torch.bool), confidence_B, state
        return confidence_B >= setting.threshold, confidence_B, state


@dataclass(frozen=True)
class PatiencePolicy(ThresholdedPolicy):
    """Leave as soon as ``patience`` exits in a row predict the same class, the last one surely.

    Exits that are off do not predict, and break no row.

    Args:
        patience: How many exits in a row must agree, at least 2.
        num_exits: Exits of the network it is for.
        rule: Confidence function: entropy, max_probability or margin.
        thresholds: How sure the last of the row must be, one per exit but the final one; all 0,
            so that agreeing is enough, if None.
    Raises:
        InvalidArgumentError: If ``patience`` is below 2, the rule is unknown, or there is not one
            threshold per exit, each in [0, 1] or +inf.
    Reference: Zhou et al. (2020), BERT Loses Patience; they count agreements, so that their
        patience is one less than ours, and have no thresholds.
    """

    needs_every_exit: ClassVar[bool] = True

    patience: int
    num_exits: Annotated[int, Meta(ge=1, le=10_000)]
    rule: str = "max_probability"
    thresholds: tuple[float, ...] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.patience < 2:
            raise InvalidArgumentError(
                f"The 'patience' parameter must be an int of at least 2. Got {self.patience}."
            )
        check_rule(self.rule)
        given = (0.0,) * (self.num_exits - 1) if self.thresholds is None else self.thresholds
        object.__setattr__(self, "thresholds", checked_thresholds(given))
        if len(given) != self.num_exits - 1:
            raise InvalidArgumentError(
                f"The 'thresholds' parameter must hold {self.num_exits - 1} numbers, one per exit "
                f"but the final one. Got {len(given)}."
            )

    def decide(self, exit_index: int, output: Tensor, state: State, setting: Setting) -> Decision:
        """See :meth:`Policy.decide`; the state is the last label and the length of its streak."""
        import torch

        confidence_B = CONFIDENCE_RULES[self.rule](tempered(output, setting))
        # A label that no exit predicts: what is not a number agrees with nothing after it.
        label_B = output.argmax(-1).masked_fill(confidence_B.isnan(), -1)
        streak_B = torch.ones_like(label_B)
        if state:
            last_label_B, last_streak_B = state
            streak_B = torch.where(label_B == last_label_B, last_streak_B + 1, streak_B)
        leave_B = (streak_B >= self.patience) & (confidence_B >= setting.threshold)
        if exit_index == self.num_exits - 1:
            leave_B = torch.ones_like(leave_B)
        return leave_B, confidence_B, (label_B, streak_B)


def never_leave(num_exits: int) -> ThresholdPolicy:
    """Send every sample to the final exit; the heads before it are not run.

    Args:
        num_exits: Exits of the network it is for, at least 1.
    Returns:
        A policy with every exit but the final one switched off.
    """
    return ThresholdPolicy((math.inf,) * (num_exits - 1))


def always_leave_at(exit_index: int, *, num_exits: int) -> ThresholdPolicy:
    """Let every sample leave at one exit (NaN goes on to the final one).

    Args:
        exit_index: The exit to leave at, in [0, num_exits - 1].
        num_exits: Exits of the network it is for.
    Returns:
        A policy with the exits before it switched off.
    Raises:
        InvalidArgumentError: If there is no such exit.
    """
    if not 0 <= exit_index < num_exits:
        raise InvalidArgumentError(
            f"The 'exit_index' parameter must be an int in [0, {num_exits - 1}]. Got {exit_index}."
        )
    return ThresholdPolicy(
        tuple(0.0 if k == exit_index else math.inf for k in range(num_exits - 1))
    )


def checked_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    """Thresholds as floats, each of them allowed."""
    try:
        numbers = tuple(float(t) for t in thresholds)
    except (TypeError, ValueError) as error:  # such as 0.9, or "0.9"
        raise InvalidArgumentError(
            "The 'thresholds' parameter must hold a number for each exit but the final one, such "
            f"as (0.9, inf). Got {thresholds!r}."
        ) from error
    for threshold in numbers:
        if not (0 <= threshold <= 1 or threshold == math.inf):
            raise InvalidArgumentError(
                f"A threshold must be in [0, 1], or inf to switch its exit off. Got {threshold}."
            )
    return numbers


def checked_temperatures(
    temperatures: Sequence[float] | None, *, num_exits: int
) -> tuple[float, ...] | None:
    """Temperatures as floats, each of them allowed."""
    if temperatures is None:
        return None
    numbers = tuple(float(t) for t in temperatures)
    if len(numbers) != num_exits or not all(0 < t < math.inf for t in numbers):
        raise InvalidArgumentError(
            f"The 'temperatures' parameter must hold {num_exits} positive numbers, one per exit. "
            f"Got {numbers}."
        )
    return numbers


def check_rule(rule: str) -> None:
    """Refuse a confidence function that there is not."""
    if rule not in CONFIDENCE_RULES:
        raise InvalidArgumentError(
            f"The rule must be one of {', '.join(CONFIDENCE_RULES)}. Got {rule!r}."
        )


def tempered(output: Tensor, setting: Setting) -> Tensor:
    """Divide logits by a setting's temperature, unless that is plainly 1."""
    is_plain = isinstance(setting.temperature, float) and setting.temperature == 1
    return output if is_plain else output / setting.temperature
