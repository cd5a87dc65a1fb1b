"""Running less must answer what choosing afterwards answers, whichever engine runs.

Shapes: ``B`` batch, ``C`` classes, ``K`` exits, ``G`` gates, ``L`` layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.errors import OfframpError
from offramp.inference.halting import HaltingRunner
from offramp.inference.runner import Runner, TorchRunner
from offramp.inference.skipping import SkipRunner
from offramp.model.multi_exit import Features, MultiExitNetwork, as_features
from offramp.policy.policies import Policy, State, ThresholdedPolicy
from offramp.results import AdaptiveResult
from offramp.routing.halting import HaltingNetwork
from offramp.routing.skip import SkipNetwork, at_threshold

DECISION_TOLERANCE = 1e-4
"""Samples whose confidence lies this near a threshold may leave at another exit, run another block,
or lose a token in another layer."""

SINGLE_SAMPLES = 64
"""Samples that are also compared one by one, which a bundle answers by another file; at most."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the answers of a runner compare with choosing afterwards.

    Attributes:
        num_samples: Samples compared.
        moved: Samples that left by another exit, or ran other blocks or tokens.
        moved_far: Those of them whose confidences all lie away from the thresholds.
        differences: Largest difference of the logits at each exit, over the samples that went the
            same way in both; 0 where there is none.
        differs: Whether a difference is beyond rounding (1e-4, or 1e-3 of the value).
    """

    num_samples: int
    moved: int
    moved_far: int
    differences: tuple[float, ...]
    differs: bool

    @property
    def holds(self) -> bool:
        """Whether both say the same but for at most one sample in a thousand, and for rounding."""
        few = self.moved <= max(1, self.num_samples / 1000)
        return few and self.moved_far == 0 and not self.differs


@torch.no_grad()
def compare_with_all_exits(
    result: AdaptiveResult[Any],
    network: MultiExitNetwork,
    policy: Policy,
    inputs: Tensor | Features,
) -> Agreement:
    """Compare what a runner of any engine said with the all-exits loop.

    Args:
        result: The runner's answers for the inputs.
        network: The network, in evaluation mode.
        policy: Who leaves where.
        inputs: Samples, shape (N, ...); a tuple where the network takes several inputs.
    Returns:
        How the two compare.
    """
    output, chosen, confidence_KB = all_exits_loop(network, policy, inputs)
    thresholds = policy.thresholds if isinstance(policy, ThresholdedPolicy) else ()
    return compare_answers(
        result,
        output,
        chosen,
        is_near_B=is_near(confidence_KB, thresholds),
        num_exits=network.num_exits,
    )


def compare_answers(
    result: AdaptiveResult[Any],
    output: Tensor,
    chosen: Tensor,
    *,
    is_near_B: Tensor,
    num_exits: int,
) -> Agreement:
    """Compare what a runner said with what choosing afterwards says, whichever engine chose.

    Args:
        result: The runner's answers.
        output: Logits of the exits that were chosen afterwards, shape (B, C).
        chosen: Those exits, shape (B,), int64.
        is_near_B: What :func:`is_near` says of the samples.
        num_exits: Exits of the network.
    Returns:
        How the two compare.
    """
    return _agreement(
        torch.as_tensor(result.output, device=output.device),
        output,
        torch.as_tensor(result.exit_index, device=chosen.device) == chosen,
        is_near_B=is_near_B,
        groups=[chosen == k for k in range(num_exits)],
    )


def _agreement(
    said_BC: Tensor,
    expected_BC: Tensor,
    went_alike_B: Tensor,
    *,
    is_near_B: Tensor,
    groups: Sequence[Tensor],
) -> Agreement:
    """Compare logits of those that went the same way, group by group, and count the others."""
    gap_BC = (said_BC - expected_BC).abs()
    is_within_BC = gap_BC <= DECISION_TOLERANCE + 1e-3 * expected_BC.abs()
    is_beyond_B = ~is_within_BC.flatten(1).all(-1)
    differences = [
        float(gap_BC[here].max()) if (here := went_alike_B & group_B).any() else 0.0
        for group_B in groups
    ]
    return Agreement(
        num_samples=len(expected_BC),
        moved=int((~went_alike_B).sum()),
        moved_far=int((~went_alike_B & ~is_near_B).sum()),
        differences=tuple(differences),
        differs=bool((is_beyond_B & went_alike_B).any()),
    )


@torch.no_grad()
def compare_with_gated_sum(
    result: AdaptiveResult[Any], network: SkipNetwork, threshold: float, inputs: Tensor
) -> Agreement:
    """Compare what a runner of any engine said with running every block and masking.

    Args:
        result: The runner's answers for the inputs.
        network: The network, in evaluation mode.
        threshold: What a gate's probability must reach for its block to count.
        inputs: Samples, shape (N, ...).
    Returns:
        How the two compare.
    """
    expected = network(inputs, at_threshold(threshold))
    return compare_blocks(
        result,
        expected.logits,
        expected.action.bool(),
        is_near_BG=(expected.probability - threshold).abs() < DECISION_TOLERANCE,
    )


def compare_blocks(
    result: AdaptiveResult[Any], output: Tensor, blocks_BG: Tensor, *, is_near_BG: Tensor
) -> Agreement:
    """Compare what a runner said with what running every block says, whichever engine ran them.

    Args:
        result: The runner's answers.
        output: Logits where blocks were masked afterwards, shape (B, C).
        blocks_BG: The blocks that counted there, shape (B, G), bool.
        is_near_BG: Whether a gate's probability lies within 1e-4 of the threshold there.
    Returns:
        How the two compare.
    """
    went_alike_BG = torch.as_tensor(result.blocks, device=blocks_BG.device) == blocks_BG
    went_alike_B = went_alike_BG.all(1)
    # Rounding may decide where the ways part; gates after that see other features.
    parting_B = went_alike_BG.int().argmin(1)
    return _agreement(
        torch.as_tensor(result.output, device=output.device),
        output,
        went_alike_B,
        is_near_B=is_near_BG.gather(1, parting_B[:, None])[:, 0],
        groups=[torch.ones_like(went_alike_B)],
    )


@torch.no_grad()
def compare_with_masked(
    result: AdaptiveResult[Any],
    network: HaltingNetwork,
    threshold: float,
    inputs: Tensor | Features,
    *,
    first_layers: Sequence[int] | None = None,
) -> Agreement:
    """Compare what a runner of any engine said with computing every token and masking.

    Args:
        result: The runner's answers for the inputs.
        network: The network, in evaluation mode.
        threshold: What the sum of a token's scores must reach for it to halt.
        inputs: Samples, shape (N, ...); a tuple where the network takes several inputs.
        first_layers: Layers in front of which tokens are dropped; every one if None.
    Returns:
        How the two compare.
    """
    expected = network(*as_features(inputs), threshold=threshold)
    is_near_BTL = expected.runs & ((expected.total - threshold).abs() < DECISION_TOLERANCE)
    return compare_tokens(
        result,
        expected.logits,
        expected.tokens,
        is_near_BL=is_near_BTL.any(1),
        first_layers=first_layers,
    )


def compare_tokens(
    result: AdaptiveResult[Any],
    output: Tensor,
    tokens_BL: Tensor,
    *,
    is_near_BL: Tensor,
    first_layers: Sequence[int] | None = None,
) -> Agreement:
    """Compare what a runner said with what masking says, whichever engine masked.

    Args:
        result: The runner's answers.
        output: Logits where tokens were masked, shape (B, C).
        tokens_BL: The tokens that counted there, shape (B, L), int64.
        is_near_BL: Whether the sum of a token's scores lies within 1e-4 of the threshold there.
        first_layers: Layers in front of which tokens are dropped; every one if None.
    Returns:
        How the two compare.
    """
    steps = list(range(tokens_BL.shape[1]) if first_layers is None else first_layers)
    ran_BL = torch.as_tensor(result.tokens, device=tokens_BL.device)
    went_alike_BS = (ran_BL == tokens_BL)[:, steps]
    went_alike_B = went_alike_BS.all(1)
    # Rounding may decide in the step before the ways part; later scores are of other tokens.
    near_in_step = [part_BS.any(1) for part_BS in is_near_BL.tensor_split(steps[1:], dim=1)]
    never_B = torch.zeros_like(went_alike_B)
    is_near_BS = torch.stack([never_B, *near_in_step[:-1]], 1)
    parting_B = went_alike_BS.int().argmin(1)
    return _agreement(
        torch.as_tensor(result.output, device=output.device),
        output,
        went_alike_B,
        is_near_B=is_near_BS.gather(1, parting_B[:, None])[:, 0],
        groups=[torch.ones_like(went_alike_B)],
    )


def check_agreement(result: AdaptiveResult[Any], runner: TorchRunner, inputs: Tensor) -> None:
    """Make sure that running less answers what choosing afterwards answers, before it is timed.

    Args:
        result: What running less said of the inputs, in any engine.
        runner: Holds the network and the policy.
        inputs: Samples, shape (N, ...).
    Raises:
        OfframpError: If a sample leaves by another exit, or runs other blocks, though none of its
            confidences lies within 1e-4 of a threshold, or more than one in a thousand (and more
            than one) does, or one that goes the same way gets other logits.
    """
    if isinstance(runner, SkipRunner):
        threshold = runner.policy.threshold
        agreement = compare_with_gated_sum(result, runner.network, threshold, inputs)
    elif isinstance(runner, HaltingRunner):
        threshold = runner.policy.threshold
        agreement = compare_with_masked(result, runner.network, threshold, inputs)
    else:
        agreement = compare_with_all_exits(result, runner.network, runner.policy, inputs)
    require_agreement(agreement)


def require_agreement(agreement: Agreement) -> None:
    """Refuse answers that are not those of choosing afterwards.

    Args:
        agreement: How the two compare.
    Raises:
        OfframpError: If it does not hold.
    """
    if not agreement.holds:
        raise OfframpError(
            "Running less should answer what choosing afterwards answers, but "
            f"{agreement.moved} of {agreement.num_samples} samples went another way and logits "
            f"differ by up to {max(agreement.differences):.2g}. Nothing was timed: please report "
            "this."
        )


def answer_in_batches(
    runner: Runner, samples: Tensor | Features, *, batch_size: int
) -> AdaptiveResult[Tensor]:
    """Answers to batches of some size; engines compute one sample in other ways than several.

    Args:
        runner: Any runner.
        samples: Inputs, shape (N, ...), on its device; a tuple where there are several.
        batch_size: Samples a batch.
    Returns:
        The answers, in order.
    """
    parts = [torch.split(tensor, batch_size) for tensor in as_features(samples)]
    results = [runner.run(*batch) for batch in zip(*parts, strict=True)]

    def joined(name: str) -> Tensor:
        return torch.cat([torch.as_tensor(getattr(result, name)) for result in results])

    return AdaptiveResult(
        output=joined("output"),
        exit_index=joined("exit_index"),
        confidence=joined("confidence"),
        macs=joined("macs"),
        blocks=None if results[0].blocks is None else joined("blocks"),
        tokens=None if results[0].tokens is None else joined("tokens"),
    )


def all_exits_loop(
    network: MultiExitNetwork, policy: Policy, inputs: Tensor | Features
) -> tuple[Tensor, Tensor, Tensor]:
    """Run every stage and head on every sample, then choose: what early exit must equal.

    Args:
        network: The network, in evaluation mode.
        policy: Who leaves where.
        inputs: Samples, shape (B, ...); a tuple where the network takes several inputs.
    Returns:
        output: Logits of the chosen exits, shape (B, C).
        exit_index: Shape (B,), int64.
        confidences: Of every exit, shape (K, B).
    """
    outputs = network(*as_features(inputs))
    state: State = ()
    rows = torch.arange(len(outputs[0]), device=outputs[0].device)
    chosen = torch.full_like(rows, -1)
    confidences = []
    for k, output in enumerate(outputs):
        if policy.is_off(k):  # its head does not run, and the policy never hears of it
            confidences.append(output.new_full((len(output),), math.nan))
            continue
        leave_B, confidence_B, state = policy.step(k, output, state)
        confidences.append(confidence_B)
        chosen = torch.where((chosen < 0) & leave_B, k, chosen)
    stacked = torch.stack(outputs)
    return stacked[chosen, rows], chosen, torch.stack(confidences)


def is_near(confidence_KB: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Which samples may leave elsewhere, because rounding decides.

    Args:
        confidence_KB: Of every exit, shape (K, B).
        thresholds: One per exit but the final one; none for a policy that has none.
    Returns:
        Whether a confidence lies within 1e-4 of its threshold, shape (B,), bool.
    """
    thresholds_K = confidence_KB.new_tensor(thresholds)
    gap_KB = (confidence_KB[: len(thresholds)] - thresholds_K[:, None]).abs()
    return (gap_KB < DECISION_TOLERANCE).any(0)
