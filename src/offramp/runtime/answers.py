"""Answers to single samples in words: the same for a run and its bundle. No torch.

Shapes: ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.results import AdaptiveResult
from offramp.runtime.dense import label_maps

Array = npt.NDArray[Any]

_MOST_NAMED = 3
"""So many classes of an image are named, where every pixel has one."""

_DECIDES_INSIDE = ("gates", "halting")
"""Kinds of policies that go by no confidence: theirs is the largest class probability."""


@dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """The answer to one sample.

    Attributes:
        label: Name of the class; of pixels, the classes of most of them with their shares.
        probability: Of that class at the policy's temperature; None where every pixel has a class.
        confidence: The policy's, which is no probability of the class.
        rule: How the policy measures it.
        way: Where the sample left, or what ran inside.
        macs_share: MACs that ran over those that the plain network takes for this sample.
    """

    label: str
    probability: float | None
    confidence: float
    rule: str
    way: str
    macs_share: float

    def __str__(self) -> str:
        sure = "" if self.probability is None else f"  probability {self.probability:.3f}"
        return (
            f"{self.label}{sure}  confidence {self.confidence:.3f} (rule {self.rule})  {self.way}  "
            f"{100 * self.macs_share:.2f} % of the plain network's MACs"
        )


def describe_answers(
    result: AdaptiveResult[Array],
    *,
    policy: Mapping[str, Any],
    class_names: Sequence[str],
    plain_macs_B: Array,
    size: tuple[int, ...] = (),
) -> list[SampleAnswer]:
    """Say what a network answered, sample by sample."""
    labels = _labels(result.output, class_names, size)
    probabilities = _probabilities(result, policy.get("temperatures"))
    rule, ways = rule_in_words(policy), _ways(result)
    shares_B = result.macs / plain_macs_B
    return [
        SampleAnswer(
            label=label,
            probability=probability,
            confidence=float(result.confidence[row]),
            rule=rule,
            way=ways[row],
            macs_share=float(shares_B[row]),
        )
        for row, (label, probability) in enumerate(zip(labels, probabilities, strict=True))
    ]


def rule_in_words(policy: Mapping[str, Any]) -> str:
    """Name how a policy measures confidence.

    Example:
        >>> rule_in_words({"kind": "patience", "rule": "entropy", "patience": 2})
        'entropy, 2 exits in a row'
    """
    rule = str(policy.get("rule", policy["kind"]))
    if policy["kind"] in _DECIDES_INSIDE:
        return "max_probability"
    if "patience" in policy:
        return f"{rule}, {policy['patience']} exits in a row"
    if rule == "pixel_share":
        return f"{rule} of pixels surer than {policy['pixel_threshold']}"
    return rule


def token_depths(tokens_BL: Array) -> Array:
    """Layers that a token of each sample runs, the mean over its tokens, the class token counted.

    Example:
        >>> token_depths(np.array([[4, 3, 1]])).tolist()
        [2.0]
    """
    depth_B: Array = tokens_BL.sum(1) / tokens_BL[:, 0].clip(min=1)
    return depth_B


def _labels(output: Array, class_names: Sequence[str], size: tuple[int, ...]) -> list[str]:
    def name(index: int) -> str:
        return class_names[index] if index < len(class_names) else str(index)

    if output.ndim == 2:
        return [name(index) for index in output.argmax(1).tolist()]
    return [_most_of(labels_HW, name) for labels_HW in label_maps(output, size)]


def _most_of(labels_HW: Array, name: Callable[[int], str]) -> str:
    """The classes of most pixels, with their shares."""
    counts_C = np.bincount(labels_HW.ravel())
    most = np.argsort(-counts_C, kind="stable")[:_MOST_NAMED].tolist()
    return ", ".join(
        f"{name(index)} {100 * counts_C[index] / labels_HW.size:.2f} %"
        for index in most
        if counts_C[index]
    )


def _probabilities(
    result: AdaptiveResult[Array], temperatures: Sequence[float] | None
) -> list[float | None]:
    """Of the class that is named, at the temperature of the exit that said so."""
    if result.output.ndim > 2:
        return [None] * len(result.output)
    logits_BC = result.output.astype(np.float64)
    if temperatures is not None:
        logits_BC = logits_BC / np.asarray(temperatures)[result.exit_index][:, None]
    odds_BC = np.exp(logits_BC - logits_BC.max(1, keepdims=True))
    return [float(p) for p in 1 / odds_BC.sum(1)]


def _ways(result: AdaptiveResult[Array]) -> list[str]:
    if result.blocks is not None:
        num_gates = result.blocks.shape[1]
        return [f"{count} of {num_gates} gated blocks" for count in result.blocks.sum(1).tolist()]
    if result.tokens is not None:
        num_layers = result.tokens.shape[1]
        depths = token_depths(result.tokens).tolist()
        return [f"{depth:.2f} of {num_layers} layers a token" for depth in depths]
    return [f"exit {index}" for index in result.exit_index.tolist()]
