"""One threshold that steers a whole network, as of gates or of tokens: chosen from a few that ran.

Exits can be judged without running them early: every exit's logits are there. What a block that is
skipped, or a token that is dropped, does to the answer shows only when it is gone, so the network
runs at each threshold.

Shapes: ``K`` thresholds, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from offramp.calibration.chosen import Calibration, ExitAlone, Figures
from offramp.calibration.evidence import Evidence
from offramp.calibration.risk import RISKS, cautious_losses, check_risk_fits
from offramp.calibration.rules import Rule
from offramp.calibration.search import Floats
from offramp.calibration.targets import Budget, RiskLimit
from offramp.errors import InvalidArgumentError, ShapeError
from offramp.measure.arrays import Numbers, as_array
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy, RoutingPolicy
from offramp.tables import Lines, Table


@dataclass(frozen=True, kw_only=True)
class Sweep(Evidence[RoutingPolicy]):
    """Logits of a network on every sample at each of several thresholds, and their costs.

    Attributes:
        logits_KNC: Raw logits, shape (K, N, C), float32, a tensor on the CPU or an array.
        labels_N: Classes, shape (N,), int64, likewise.
        prior: Share of each class in the population that figures are about, C numbers that sum
            to 1, none negative; None where the samples are drawn from it as they are.
        thresholds: K of them, from the cheapest to the one at which most runs; for gates
            descending to 0, for tokens that halt ascending to 1.
        macs_KN: MACs that ran for each sample, shape (K, N), int64, likewise.
        plain_macs: MACs per sample of the plain network.
        policy: The kind of policy that they are thresholds of; if None, of gates where they
            descend, else of tokens that halt.
    """

    has_fixed_candidates: ClassVar[bool] = True
    tensors_KN: ClassVar[tuple[str, ...]] = ("logits_KNC", "macs_KN")

    thresholds: tuple[float, ...]
    macs_KN: Numbers
    plain_macs: int
    policy: type[RoutingPolicy] | None = None

    def __post_init__(self) -> None:
        if self.policy is None:
            is_of_gates = self.thresholds[-1:] < self.thresholds[:1] or self.thresholds[-1:] == (0,)
            object.__setattr__(self, "policy", GatePolicy if is_of_gates else HaltingPolicy)
        expected = (len(self.thresholds), len(self.labels_N))
        for name, values in (("logits", self.logits_KNC), ("MACs", self.macs_KN)):
            if values.shape[:2] != expected:
                raise ShapeError(
                    f"Expected {name} of {expected[0]} thresholds and {expected[1]} labels. "
                    f"Got shape {tuple(values.shape)}."
                )
        super().__post_init__()

    @property
    def accuracy_K(self) -> Floats:
        """Accuracy at each threshold, shape (K,)."""
        return self._mean_K(self.correct_KN)

    @property
    def mean_macs_K(self) -> Floats:
        """Mean MACs per sample at each threshold, shape (K,)."""
        return self._mean_K(self.macs_KN)

    def policies(self, rule: Rule | None) -> tuple[RoutingPolicy, ...]:
        """Policies of all thresholds, the cheapest first; a rule is refused."""
        _refuse("rule", rule)
        assert self.policy is not None  # set where it was left out
        return tuple(map(self.policy, self.thresholds))

    def best(
        self,
        target: Budget | RiskLimit,
        policies: Sequence[RoutingPolicy],
        *,
        off: frozenset[int] = frozenset(),
    ) -> ChosenThreshold:
        """Pick one of the thresholds."""
        _refuse("off", off or None)
        rows_K = [self._row(policy) for policy in policies]
        mean_macs_K = self.mean_macs_K[rows_K]
        if isinstance(target, Budget):
            worth_K = self.accuracy_K[rows_K]
        else:
            check_risk_fits(target.risk, self)
            losses_KN = RISKS[target.risk].losses(self)[rows_K]
            worth_K = -np.average(losses_KN, axis=1, weights=self.weights_N)
        score_K = target.score(worth_K, mean_macs_K, plain_macs=self.plain_macs)
        if score_K.max() == -np.inf:
            highest, cheapest = float(worth_K.max()), float(mean_macs_K.min())
            raise target.out_of_reach(worth=highest, macs=cheapest, where="any threshold")
        return self.measure(policies[int(score_K.argmax())])

    def measure(self, policy: RoutingPolicy) -> ChosenThreshold:
        """Look up what the network reached at a threshold."""
        k = self._row(policy)
        return ChosenThreshold(
            policy=policy,
            accuracy=float(self.accuracy_K[k]),
            mean_macs=float(self.mean_macs_K[k]),
            final_exit=Figures(accuracy=float(self.accuracy_K[-1])),
            plain_macs=self.plain_macs,
            num_samples=len(self.labels_N),
        )

    def safest_first(
        self, policies: Sequence[RoutingPolicy], limit: RiskLimit
    ) -> tuple[RoutingPolicy, ...]:
        """Go from where most runs to where least does, whatever the samples are."""
        return tuple(reversed(policies))

    def losses(self, policies: Sequence[RoutingPolicy], risk: str) -> Iterator[Floats]:
        """Yield what each sample loses at each threshold."""
        losses_KN = cautious_losses(risk, self) * self.weights_N
        yield from (losses_KN[self._row(policy)] for policy in policies)

    def least_macs(self, policies: Sequence[RoutingPolicy]) -> float:
        """Mean MACs at the cheapest threshold."""
        return float(self.mean_macs_K[[self._row(policy) for policy in policies]].min())

    def alone(self) -> tuple[ExitAlone, ...]:
        """Measure the only exit, where most runs."""
        macs = min(self.plain_macs, round(float(self.mean_macs_K[-1])))  # no gate is asked there
        return (ExitAlone(index=0, accuracy=float(self.accuracy_K[-1]), macs=macs),)

    def _check_same_network(self, other: Sweep) -> None:
        of_both = [
            (each.thresholds, None if each.is_ragged else each.plain_macs) for each in (self, other)
        ]
        if of_both[0] != of_both[1]:
            raise InvalidArgumentError(
                "Expected sweeps of one network at the same thresholds. "
                f"Got {of_both[0]} against {of_both[1]}."
            )

    def _row(self, policy: RoutingPolicy) -> int:
        return self.thresholds.index(policy.threshold)

    def _mean_K(self, values_KN: Numbers) -> Floats:
        values = as_array(values_KN).astype(np.float64)
        mean_K: Floats = np.average(values, axis=1, weights=self.weights_N)
        return mean_K


@dataclass(frozen=True, kw_only=True, repr=False)
class ChosenThreshold(Calibration[RoutingPolicy]):
    """A threshold and what it reached on the data that chose it; print it for a table."""

    @property
    def threshold(self) -> float:
        """The threshold of the policy."""
        return self.policy.threshold

    @property
    def whole_accuracy(self) -> float | None:
        """Accuracy where most runs, on the calibration data."""
        return None if self.final_exit is None else self.final_exit.accuracy

    def _title(self) -> str:
        on = "" if self.num_samples is None else f", on {self.num_samples:,} calibration samples"
        return f"threshold {self.threshold:.4f}{on}"

    def _parts(self) -> list[Table | Lines]:
        return [Lines(self._lines(way="it", last="where most runs"))]

    def _records(self) -> list[dict[str, Any]]:
        names = ("threshold", "accuracy", "mean_macs")
        return [{name: getattr(self, name) for name in names}]


def _refuse(name: str, given: object) -> None:
    if given is not None:
        raise InvalidArgumentError(
            f"The {name!r} parameter is about exits. Gates and tokens share one threshold: leave "
            "it out."
        )
