"""Logits of every exit on labelled samples.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from offramp.calibration.chosen import Calibration, ExitAlone, ExitOfCalibration, Figures
from offramp.calibration.evidence import Evidence
from offramp.calibration.risk import RISKS, cautious_losses, check_risk_fits
from offramp.calibration.rules import Rule, policies_named
from offramp.calibration.search import Floats, exits_left_by
from offramp.calibration.targets import QUALITY_GAP, Budget, RiskLimit, feasible
from offramp.calibration.temperature import fit_temperature
from offramp.calibration.thresholds import confidences, search_for, search_thresholds
from offramp.errors import InfeasibleTargetError, InvalidArgumentError, ShapeError
from offramp.measure.arrays import as_array, softmax
from offramp.measure.exit_costs import ExitCosts
from offramp.measure.outputs import shape_in_words
from offramp.policy.policies import ThresholdedPolicy

LARGEST_HALF = float(np.finfo(np.float16).max)
"""The largest number that half precision holds."""


@dataclass(frozen=True, kw_only=True)
class ExitLogits(Evidence[ThresholdedPolicy]):
    """Logits of every exit on every sample, and the costs of the exits.

    Attributes:
        logits_KNC: Raw logits, shape (K, N, C), float32, a tensor on the CPU or an array.
        labels_N: Classes, shape (N,), int64, likewise.
        prior: Share of each class in the population that figures are about, C numbers that sum
            to 1, none negative; None where the samples are drawn from it as they are.
        costs: MACs per sample of each stage and head.
        numbers: Of each exit in the network, ascending; 0 to K - 1 if left out.
    """

    costs: ExitCosts
    numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain_macs", self.costs.plain_macs)
        if not self.numbers:
            object.__setattr__(self, "numbers", tuple(range(self.costs.num_exits)))
        expected = (self.costs.num_exits, len(self.labels_N))
        axes = ("K", "N", *self.outputs.logit_axes)
        if self.logits_KNC.ndim != len(axes) or self.logits_KNC.shape[:2] != expected:
            raise ShapeError(
                f"Expected logits of shape {shape_in_words(axes)} for K = {self.costs.num_exits} "
                f"exits and N = {len(self.labels_N)} labels. "
                f"Got {tuple(self.logits_KNC.shape)}."
            )
        if len(self.numbers) != self.costs.num_exits:
            raise ShapeError(
                f"Expected {self.costs.num_exits} numbers, one per exit. Got {self.numbers}."
            )
        super().__post_init__()

    @property
    def scores_KN(self) -> Floats:
        """Scores of the samples at each exit: of their mean, :meth:`quality` is to be high.

        Shape (K, N), or (K, N, D) where they are vectors.
        """
        return as_array(self.correct_KN).astype(np.float64)

    def quality(self, mean_J: Floats) -> Floats:
        """Figures of answers by the mean of their scores: the accuracy, which is that mean.

        Args:
            mean_J: Mean scores of several ways to answer, shape (J,) or (J, D).
        Returns:
            Fractions, shape (J,).
        """
        return mean_J

    @property
    def expected_scores_KN(self) -> Floats:
        """Scores with less noise than right or wrong, shape (K, N), about in [0, 1].

        :attr:`plausibility_KN`, plus a constant per exit that makes its mean the exit's measured
        accuracy, which may lead a little beyond. Thresholds that are compared by it differ by what
        they do to all samples that change exits, not by the luck of the few whose answers change
        from wrong to right.
        """
        correct_KN = as_array(self.correct_KN).astype(np.float64)
        expected_KN = self.plausibility_KN
        offset_K = np.average(correct_KN - expected_KN, axis=1, weights=self.weights_N)
        shifted: Floats = expected_KN + offset_K[:, None]
        return shifted

    @property
    def plausibility_KN(self) -> Floats:
        """Probability by the final exit of what each exit says, shape (K, N), in [0, 1].

        Its probability of the class that an exit predicts, at the temperature that fits the labels
        best: no exit is more plausible than the final one. Right or wrong where its logits are NaN.
        """
        final_NC = as_array(self.logits_KNC)[-1].astype(np.float64)
        p_NC = softmax(final_NC / fit_temperature(self, -1))
        p_KN = p_NC[np.arange(len(p_NC)), self.predicted_KN]
        filled: Floats = np.where(np.isnan(p_KN), as_array(self.correct_KN), p_KN)
        return filled

    def rounded(self) -> Self:
        """Leave out the last bits of logits, which differ between processors: ties break alike."""
        logits_KNC = as_array(self.logits_KNC).clip(-LARGEST_HALF, LARGEST_HALF)
        rounded_KNC = logits_KNC.astype(np.float16).astype(np.float32)
        return replace(self, logits_KNC=rounded_KNC, labels_N=as_array(self.labels_N))

    @property
    def quality_K(self) -> Floats:
        """Quality of each exit, shape (K,)."""
        return self.quality(np.average(self.scores_KN, axis=1, weights=self.weights_N))

    def figures(self, exit_N: npt.NDArray[np.int64]) -> Figures:
        """Measure the answers that samples get by certain exits.

        Args:
            exit_N: Number of an exit for each sample, counted in these logits, shape (N,).
        Returns:
            The figures.
        """
        return next(self.figures_each([exit_N]))

    def figures_each(self, exits_JN: Iterable[npt.NDArray[np.int64]]) -> Iterator[Figures]:
        """Measure the answers by each of several choices of exits."""
        correct_KN, weights_N = as_array(self.correct_KN).astype(np.float64), self.weights_N
        for exit_N in exits_JN:
            left_by = correct_KN[exit_N, np.arange(len(exit_N))]
            yield Figures(accuracy=float(np.average(left_by, weights=weights_N)))

    def samples_at(
        self, exit_index: int
    ) -> tuple[Floats, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Gather the logits of an exit wherever there is a label.

        Args:
            exit_index: Which exit, counted in these logits.
        Returns:
            logits: Shape (M, C), float64.
            labels: Shape (M,), int64.
            sample: The sample that each belongs to, shape (M,).
        """
        logits_NC = as_array(self.logits_KNC)[exit_index].astype(np.float64)
        labels_N = as_array(self.labels_N).astype(np.int64)
        return logits_NC, labels_N, np.arange(len(labels_N))

    def known_confidences(self, policy: ThresholdedPolicy, off: frozenset[int]) -> Floats | None:
        """Confidences of a policy where they came with the logits; None: it has to be asked."""
        return None

    def policies(self, rule: Rule | None) -> tuple[ThresholdedPolicy, ...]:
        """Policies of a rule's name, of a function or as they are, on which thresholds are set."""
        num_exits = self.costs.num_exits
        if rule is None or isinstance(rule, str):
            return policies_named(rule, num_exits, self.outputs)
        made = rule if isinstance(rule, ThresholdedPolicy) else rule(self)
        policies = (made,) if isinstance(made, ThresholdedPolicy) else tuple(made)
        for policy in policies:
            if policy.num_exits != num_exits:
                raise InvalidArgumentError(
                    f"Expected a policy for {num_exits} exits. Got one for {policy.num_exits}."
                )
        return policies

    def best(
        self,
        target: Budget | RiskLimit,
        policies: Sequence[ThresholdedPolicy],
        *,
        off: frozenset[int] = frozenset(),
    ) -> Calibration:
        """Search the thresholds of each policy."""
        if not off <= set(range(self.costs.num_exits - 1)):
            raise InvalidArgumentError(
                f"The 'off' parameter must hold exits in [0, {self.costs.num_exits - 2}], the "
                f"final one never. Got {sorted(off)}."
            )
        if isinstance(target, Budget):
            worth_KN = self.expected_scores_KN
        elif target.risk == QUALITY_GAP:  # the final exit itself is always within it
            target = replace(target, whole=float(self.quality_K[-1]))
            worth_KN = self.scores_KN
        else:
            check_risk_fits(target.risk, self)
            worth_KN = -RISKS[target.risk].losses(self)
        reached = feasible(
            policies, lambda policy: self.reach(target, policy, worth_KN=worth_KN, off=off)
        )
        return min(reached, key=target.rank)

    def reach(
        self,
        target: Budget | RiskLimit,
        policy: ThresholdedPolicy,
        *,
        worth_KN: Floats,
        costs: ExitCosts | None = None,
        off: frozenset[int] = frozenset(),
    ) -> Calibration:
        """Search the thresholds of one policy; ``costs`` may be in another unit than MACs."""
        costs = costs or self.costs.with_decisions(policy.decision_macs)
        score = partial(target.score, plain_macs=costs.plain_macs)
        found, best_score, cheapest = search_thresholds(
            self, policy, worth_KN, score, costs=costs, off=off
        )
        if best_score == -math.inf:
            highest = float(np.average(worth_KN, axis=1, weights=self.weights_N).max())
            raise target.out_of_reach(worth=highest, macs=cheapest, where="any exit")
        return self.measure(found)

    def measure(self, policy: ThresholdedPolicy) -> Calibration:
        """Let the samples leave as a policy says."""
        return next(self.measure_each([policy]))

    def measure_each(self, policies: Sequence[ThresholdedPolicy]) -> Iterator[Calibration]:
        """Let the samples leave as each policy says."""
        exits_JN = list(self._left_by(policies))
        last_N = np.full(len(self.labels_N), self.costs.num_exits - 1)
        final, *reached = self.figures_each([last_N, *exits_JN])
        for policy, exit_N, figures in zip(policies, exits_JN, reached, strict=True):
            yield self._measured(policy, exit_N, figures, final)

    def _left_by(self, policies: Sequence[ThresholdedPolicy]) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the exits that samples leave by."""
        known: dict[frozenset[int], Floats] = {}  # of policies with the same exits off
        for policy in policies:
            off = policy.off_exits
            if off not in known:
                known[off] = confidences(self, policy, off)
            yield exits_left_by(known[off], policy.thresholds)

    def _measured(
        self,
        policy: ThresholdedPolicy,
        exit_N: npt.NDArray[np.int64],
        figures: Figures,
        final: Figures,
    ) -> Calibration:
        exit_macs = self.costs.with_decisions(policy.decision_macs).exit_macs(policy.off_exits)
        macs_N, weights_N = np.array(exit_macs, dtype=np.float64)[exit_N], self.weights_N
        leaving_K = np.bincount(exit_N, weights=weights_N, minlength=len(exit_macs)) / len(exit_N)
        rows = zip(self.numbers, leaving_K.tolist(), exit_macs, strict=True)
        return Calibration(
            policy=policy,
            mean_macs=float(np.average(macs_N, weights=weights_N)),
            final_exit=final,
            plain_macs=self.plain_macs,
            num_samples=len(exit_N),
            exits=tuple(
                ExitOfCalibration(index=k, share=share, macs=macs) for k, share, macs in rows
            ),
            **vars(figures),
        )

    def safest_first(
        self, policies: Sequence[ThresholdedPolicy], limit: RiskLimit
    ) -> list[ThresholdedPolicy]:
        """Walk from where nobody leaves to the cheap end, with the policy that saves most here.

        Of right and wrong, a few hundred samples tell little: there, answers are judged by how
        likely the final exit finds them.
        """
        policy = policies[0] if len(policies) == 1 else self.best(limit, policies).policy
        finding, counted = self.rounded(), RISKS[limit.risk]
        worth_KN = finding.plausibility_KN if counted.counts_errors else -counted.losses(finding)
        costs = self.costs.with_decisions(policy.decision_macs)
        confidence_KN = confidences(finding, policy)
        search = search_for(finding, policy, worth_KN, confidence_KN, costs=costs)
        return [policy.with_thresholds(thresholds) for thresholds in search.front()]

    def losses(self, policies: Sequence[ThresholdedPolicy], risk: str) -> Iterator[Floats]:
        """Yield what each sample loses by the exit it leaves by."""
        losses_KN = cautious_losses(risk, self) * self.weights_N
        for exit_N in self._left_by(policies):
            yield losses_KN[exit_N, np.arange(len(exit_N))]

    def least_macs(self, policies: Sequence[ThresholdedPolicy]) -> float:
        """Mean MACs where as many leave at the cheapest exit as may."""
        cheapest_macs, worth_KN = float(min(self._macs_alone)), self.expected_scores_KN
        least = []
        for policy in policies:
            try:
                self.reach(Budget(cheapest_macs), policy, worth_KN=worth_KN)
            except InfeasibleTargetError as error:  # NaN, or a policy that waits, holds some back
                least.append(error.best_achievable)
            else:
                least.append(cheapest_macs)
        return min(least)

    @property
    def _macs_alone(self) -> list[int]:
        """MACs of a sample that leaves at each exit, no head before it run."""
        return [self.costs.exit_macs(frozenset(range(k)))[k] for k in range(self.costs.num_exits)]

    def alone(self) -> tuple[ExitAlone, ...]:
        """Measure each exit, no head before it run."""
        everybody = np.ones(len(self.labels_N), dtype=np.int64)
        figures = [self.figures(k * everybody) for k in range(self.costs.num_exits)]
        rows = zip(self.numbers, figures, self._macs_alone, strict=True)
        return tuple(ExitAlone(index=k, macs=macs, **vars(reached)) for k, reached, macs in rows)

    def _check_same_network(self, other: ExitLogits) -> None:
        shapes = [(len(each.logits_KNC), each.logits_KNC.shape[2]) for each in (self, other)]
        if shapes[0] != shapes[1]:
            raise ShapeError(
                "Expected logits of the same exits and classes. "
                f"Got {shapes[0][0]} exits and {shapes[0][1]} classes against {shapes[1][0]} and "
                f"{shapes[1][1]}."
            )
        of_both = [(each.numbers, None if each.is_ragged else each.costs) for each in (self, other)]
        if of_both[0] != of_both[1]:
            raise InvalidArgumentError(
                f"Expected logits of the same network. Got exits {self.numbers} that cost "
                f"{self.costs.exit_macs()} MACs against {other.numbers} that cost "
                f"{other.costs.exit_macs()}."
            )
