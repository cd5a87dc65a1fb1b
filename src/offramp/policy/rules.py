"""Rules by name, those of labels and those of maps, and the policy of exits that each makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offramp.measure.outputs import LABELS, MAPS
from offramp.policy.confidence import AGREEMENT, CONFIDENCE_RULES, DENSE_RULES, PIXEL_SHARE
from offramp.policy.dense_policies import DensePolicy, dense_policy
from offramp.policy.policies import ThresholdedPolicy, ThresholdPolicy


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules for exits of one kind of outputs.

    Attributes:
        default: Where none is given.
        names: All of them.
        fields: Of a policy, beside its thresholds, what policy files say was asked for.
        kind: The policies that most of them make.
        make: From a name and thresholds to the policy.
    """

    default: str
    names: tuple[str, ...]
    fields: tuple[str, ...]
    kind: type[ThresholdedPolicy]
    make: Callable[[str, Sequence[float]], ThresholdedPolicy]


RULES = {
    LABELS.name: Rules(
        default="entropy",
        names=tuple(CONFIDENCE_RULES),
        fields=("rule",),
        kind=ThresholdPolicy,
        make=lambda rule, thresholds: ThresholdPolicy(tuple(thresholds), rule=rule),
    ),
    MAPS.name: Rules(
        default=PIXEL_SHARE,
        names=(*DENSE_RULES, AGREEMENT),
        fields=("rule", "pixel_threshold"),
        kind=DensePolicy,
        make=dense_policy,
    ),
}
"""By the name of the outputs."""
