"""Policies for dense outputs: an image leaves when enough of its pixels are settled.

Shapes: ``B`` batch, ``C`` classes, ``H W`` cells of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from offramp.errors import InvalidArgumentError
from offramp.policy.confidence import (
    AGREEMENT,
    DENSE_RULES,
    PIXEL_SHARE,
    agreement_confidence,
)
from offramp.policy.policies import (
    Decision,
    Setting,
    State,
    ThresholdedPolicy,
    checked_temperatures,
    checked_thresholds,
    tempered,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DensePolicy(ThresholdedPolicy):
    """Let an image leave at exit k as soon as the confidence of its pixels reaches a threshold.

    Args:
        thresholds: One per exit but the final one, each in [0, 1], or +inf to switch the exit off.
        rule: pixel_share (of the pixels that reach ``pixel_threshold``), mean_max_probability,
            mean_entropy or low_quantile.
        pixel_threshold: How sure a pixel must be to count, in [0, 1]; for pixel_share.
        temperatures: Divide each exit's logits before its confidence is taken, one per exit,
            the final one counted; all 1 if None.
    Raises:
        InvalidArgumentError: If a threshold is NaN or out of range, the rule is unknown, or there
            is not one positive temperature per exit.
    Reference: Kouris et al. (2022), Multi-Exit Semantic Segmentation Networks, section 5.2, for
        pixel_share.
    Example:
        >>> policy = DensePolicy((0.9, float("inf")), pixel_threshold=0.8)
        >>> policy.num_exits, policy.is_off(1)
        (3, True)
    """

    takes_temperatures: ClassVar[bool] = True

    thresholds: tuple[float, ...]
    rule: str = PIXEL_SHARE
    pixel_threshold: float = 0.9
    temperatures: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", checked_thresholds(self.thresholds))
        if self.rule not in DENSE_RULES:
            raise InvalidArgumentError(
                f"The rule must be one of {', '.join(DENSE_RULES)}. Got {self.rule!r}."
            )
        if not 0 <= self.pixel_threshold <= 1:
            raise InvalidArgumentError(
                f"The 'pixel_threshold' parameter must be in [0, 1]. Got {self.pixel_threshold}."
            )
        temperatures = checked_temperatures(self.temperatures, num_exits=self.num_exits)
        object.__setattr__(self, "temperatures", temperatures)

    @property
    def num_exits(self) -> int:  # type: ignore[override]
        """Exits of the network it is for, the final one counted."""
        return len(self.thresholds) + 1

    @property
    def number_names(self) -> tuple[str, ...]:
        """See :meth:`Policy.number_names`; pixels have a threshold only where they are counted."""
        names = super().number_names
        return (*names, "pixel_threshold") if self.rule == PIXEL_SHARE else names

    def decide(self, exit_index: int, output: Tensor, state: State, setting: Setting) -> Decision:
        """See :meth:`Policy.decide`; keeps no state."""
        import torch

        confidence_B = DENSE_RULES[self.rule](tempered(output, setting), setting.pixel_threshold)
        if exit_index == len(self.thresholds):
            return torch.ones_like(confidence_B, dtype=torch.bool), confidence_B, state
        return confidence_B >= setting.threshold, confidence_B, state

    def setting(self, exit_index: int) -> Setting:
        """See :meth:`Policy.setting`; adds the threshold of a pixel."""
        return super().setting(exit_index)._replace(pixel_threshold=self.pixel_threshold)


@dataclass(frozen=True)
class AgreementPolicy(ThresholdedPolicy):
    """Let an image leave as soon as most of its pixels have the class that the exit before said.

    Nobody leaves at the first exit, which has none before it; so exits are off all or none.

    Args:
        thresholds: Share of the pixels that must agree, one per exit but the final one.
    Raises:
        InvalidArgumentError: If a threshold is NaN or outside [0, 1] and not +inf.
    """

    needs_every_exit: ClassVar[bool] = True

    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", checked_thresholds(self.thresholds))

    @property
    def num_exits(self) -> int:  # type: ignore[override]
        """Exits of the network it is for, the final one counted."""
        return len(self.thresholds) + 1

    def decide(self, exit_index: int, output: Tensor, state: State, setting: Setting) -> Decision:
        """See :meth:`Policy.decide`; the state is the classes that the last exit predicted."""
        import torch

        labels_BHW = output.argmax(1).int()
        if state:
            confidence_B = agreement_confidence(labels_BHW, state[0])
            leave_B = confidence_B >= setting.threshold
        else:
            confidence_B = torch.zeros_like(output[:, 0, 0, 0], dtype=torch.float32)
            leave_B = torch.zeros_like(confidence_B, dtype=torch.bool)
        # What is not a number says nothing, and never leaves.
        confidence_B = torch.where(output.isnan().any(1).any(1).any(1), torch.nan, confidence_B)
        if exit_index == len(self.thresholds):
            leave_B = torch.ones_like(leave_B)
        else:
            leave_B = leave_B & ~confidence_B.isnan()
        return leave_B, confidence_B, (labels_BHW,)


def dense_policy(rule: str, thresholds: Sequence[float]) -> ThresholdedPolicy:
    """The policy of a rule's name."""
    if rule == AGREEMENT:
        return AgreementPolicy(tuple(thresholds))
    if rule not in DENSE_RULES:
        raise InvalidArgumentError(
            f"The rule must be one of {', '.join((*DENSE_RULES, AGREEMENT))}, since the network "
            f"says a class for every pixel. Got {rule!r}."
        )
    return DensePolicy(tuple(thresholds), rule=rule)
