"""What ``offramp calibrate`` asks of networks that say a class for every pixel."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from offramp.errors import InvalidArgumentError

if TYPE_CHECKING:
    from offramp.policy.policies import ThresholdedPolicy


def default_rule(is_dense: bool) -> str:
    """The rule where none is named.

    Args:
        is_dense: Whether exits say a class for every pixel.
    Returns:
        Its name.
    """
    from offramp.policy.confidence import PIXEL_SHARE

    return PIXEL_SHARE if is_dense else "entropy"


def dense_policy_by_hand(
    thresholds: tuple[float, ...], rule: str, pixel_threshold: float | None
) -> ThresholdedPolicy:
    """A policy for a network that says a class for every pixel.

    Args:
        thresholds: Of images, one per exit but the final one.
        rule: Name of a dense confidence function.
        pixel_threshold: Of pixels; 0.9 if None.
    Returns:
        The policy.
    Raises:
        InvalidArgumentError: If there is no such rule, or a threshold is out of range or has no
            meaning for it.
    """
    from offramp.policy.dense_policies import dense_policy

    policy = dense_policy(rule, thresholds)
    if pixel_threshold is None:
        return policy
    return with_pixel_threshold(policy, pixel_threshold)


def refuse_pixel_threshold(threshold: float | None) -> None:
    """Refuse a threshold for pixels on a network that says one class for a sample.

    Args:
        threshold: What ``--pixel-threshold`` was given, if anything.
    Raises:
        InvalidArgumentError: If it was given.
    """
    if threshold is not None:
        raise InvalidArgumentError(
            "--pixel-threshold is for networks that say a class for every pixel. This one "
            "says one for a sample: leave it out."
        )


def with_pixel_threshold(policy: ThresholdedPolicy, threshold: float) -> ThresholdedPolicy:
    """The same policy with another threshold for pixels.

    Args:
        policy: The policy.
        threshold: How sure a pixel must be to count as sure.
    Returns:
        A new policy.
    Raises:
        InvalidArgumentError: If it counts no pixels, or the threshold is out of range.
    """
    from offramp.policy.dense_policies import DensePolicy

    if not isinstance(policy, DensePolicy) or "pixel_threshold" not in policy.number_names:
        raise InvalidArgumentError(
            "--pixel-threshold is for --rule pixel_share, which counts them."
        )
    return replace(policy, pixel_threshold=threshold)
