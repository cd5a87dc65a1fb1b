"""Accuracy against cost: policies chosen on calibration data for a row of budgets, judged on test.

Shapes: ``K`` exits, ``N`` samples, ``C`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from offramp.calibration.chosen import ExitAlone, Judged, P
from offramp.calibration.evidence import Evidence, require_evidence
from offramp.calibration.rules import Rule
from offramp.calibration.targets import Budget
from offramp.errors import InfeasibleTargetError, InvalidArgumentError
from offramp.policy.as_dict import without_inf
from offramp.tables import Brief, Lines, Printed, Table, percent, thresholds_in_words

_MAX_NUM_POINTS = 1000


@dataclass(frozen=True, kw_only=True, repr=False)
class FrontierPoint(Brief, Judged):
    """A policy that a budget led to.

    Attributes:
        budget_macs: Mean MACs per sample that were allowed on the calibration data; the least of
            them where several budgets led to the same thresholds.
        thresholds: One per exit but the final one; +inf where an exit is off. Of gates, or of
            tokens that halt, the one that they share.
        calibration_accuracy: Adaptive accuracy on the data that chose the thresholds; None for a
            network of one exit, where there is nothing to choose, without such data.
        accuracy: Adaptive accuracy on the test data, a fraction.
        mean_macs: Mean MACs per sample on the test data; may exceed the budget a little.
        calibration_mean_iou: Mean IoU on the data that chose the thresholds; None where a sample
            has one class.
        mean_iou: Mean IoU on the test data; None where a sample has one class.
        pixel_threshold: How sure a pixel must be to count as sure; None where none is counted.
    """

    budget_macs: float
    thresholds: tuple[float, ...]
    calibration_accuracy: float | None
    accuracy: float
    mean_macs: float
    calibration_mean_iou: float | None = None
    mean_iou: float | None = None
    pixel_threshold: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON; a threshold of +inf becomes None."""
        return _without_dense(asdict(self)) | {"thresholds": without_inf(self.thresholds)}


@dataclass(frozen=True, kw_only=True, repr=False)
class Frontier(Printed):
    """Accuracy against cost of one network; print it for a table.

    Attributes:
        points: What each budget led to, from the least budget on; equal thresholds once.
        exits: Each exit alone.
        plain_macs: MACs per sample of the plain network.
        area: Under the curve of the points, as a mean accuracy, or a mean of mean IoU; see
            :func:`frontier`.
    """

    points: tuple[FrontierPoint, ...]
    exits: tuple[ExitAlone, ...]
    plain_macs: int
    area: float

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON."""
        return {
            "plain_macs": self.plain_macs,
            "area": self.area,
            "points": [point.to_dict() for point in self.points],
            "exits": [_without_dense(asdict(alone)) for alone in self.exits],
        }

    @property
    def _quality(self) -> str:
        return "accuracy" if self.points[0].mean_iou is None else "mean IoU"

    def _title(self) -> str:
        return f"{len(self.points)} points on test data"

    def _parts(self) -> list[Table | Lines]:
        plain_macs = self.plain_macs
        rows = [
            (
                percent(point.budget_macs / plain_macs),
                thresholds_in_words(point.thresholds) or "-",
                percent(point.quality),
                f"{point.mean_macs:,.0f}",
                percent(point.mean_macs / plain_macs),
            )
            for point in self.points
        ]
        lines = [
            (
                f"exit {alone.index} alone",
                f"{percent(alone.quality)} at {alone.macs:,} MACs, "
                f"{percent(alone.macs / plain_macs)} of the plain network's",
            )
            for alone in self.exits
        ]
        area = f"{percent(self.area)} mean {self._quality} over costs up to the plain network's"
        return [
            Table(("budget", "thresholds", self._quality, "mean MACs", "of plain"), rows),
            Lines([*lines, ("area", f"{area} {plain_macs:,} MACs")]),
        ]

    def _records(self) -> list[dict[str, Any]]:
        return [point.to_dict() for point in self.points]


def frontier(
    calibration: Evidence[P] | None,
    test: Evidence[P],
    *,
    num_points: int = 10,
    rule: Rule | None = None,
) -> Frontier:
    """Follow the trade-off of accuracy and cost on data that chose none of its points.

    The budgets grow by the same factor from the least that can be spent on the calibration data,
    which is what the cheapest exit alone costs unless a sample may not leave there, to the plain
    network's MACs. For each, thresholds are chosen on the calibration data; accuracy and mean MACs
    are those on the test data. Points that chose the same thresholds appear once.

    The area is that under a step curve of accuracy against the share of the plain network's MACs,
    divided by the width of the curve: the mean accuracy over all costs from the cheapest point's
    to the plain network's. At each cost stands the test accuracy of one of the points that cost no
    more on the test data: the one that was most accurate on the calibration data, so that the test
    data does not choose; of equal ones, the cheaper. Beyond the last point the curve is flat;
    points that cost more than the plain network do not count. Where no point is cheaper than it,
    as in a network of one exit, the area is the accuracy of the cheapest point. Each network is
    measured by its own plain network: areas of networks of different sizes do not compare.

    Args:
        calibration: Every exit's logits, or a sweep over the thresholds of gates or tokens, on
            data that neither trained the network nor will judge it; may be None for a network of
            one exit.
        test: The same on the data that judges.
        num_points: How many budgets, in [2, 1000]: both ends are among them.
        rule: As for :func:`~offramp.calibrate`; a function makes its policy from the calibration
            data, once.
    Returns:
        The points, each exit alone, and the area.
    Raises:
        InvalidArgumentError: If ``num_points`` is out of range, there is no such rule, calibration
            data is missing, or the two were collected from different networks.
        ShapeError: If they differ in the number of exits or classes.
    """
    check_num_points(num_points)
    require_evidence(test, *([] if calibration is None else [calibration]))
    if calibration is None:
        points = [_only_point(test)]
    else:
        calibration.check_same_network(test)
        points = _points(calibration, test, calibration.policies(rule), num_points)
    return Frontier(
        points=tuple(points),
        exits=test.alone(),
        plain_macs=test.plain_macs,
        area=_area(points, plain_macs=test.plain_macs),
    )


def check_num_points(num_points: int) -> None:
    """Refuse a curve without two ends, or an endless one."""
    if not 2 <= num_points <= _MAX_NUM_POINTS:
        raise InvalidArgumentError(
            f"The 'num_points' parameter must be an int in [2, {_MAX_NUM_POINTS}]: the cheapest "
            f"and the dearest budget are among them. Got {num_points}."
        )


def _only_point(test: Evidence[P]) -> FrontierPoint:
    """Of a network of one exit, for which nothing is chosen."""
    policy = test.policies(None)[0]
    if policy.thresholds:
        num_exits = policy.num_exits
        got = f"one of {num_exits} exits" if num_exits > 1 else "one that a threshold steers"
        raise InvalidArgumentError(
            "The 'calibration' parameter may be None for a network of one exit only. "
            f"Got {got}: give data to choose its thresholds on."
        )
    reached = test.measure(policy)
    return FrontierPoint(
        budget_macs=float(test.plain_macs),
        thresholds=(),
        calibration_accuracy=None,
        accuracy=reached.accuracy,
        mean_macs=reached.mean_macs,
        mean_iou=reached.mean_iou,
    )


def _points(
    calibration: Evidence[P], test: Evidence[P], policies: Sequence[P], num_points: int
) -> list[FrontierPoint]:
    """Find the point that each budget leads to; none for a budget that cannot be kept."""
    points: dict[object, FrontierPoint] = {}
    least_macs = calibration.least_macs(policies)
    for budget_macs in np.geomspace(least_macs, calibration.plain_macs, num_points).tolist():
        with suppress(InfeasibleTargetError):
            chosen = calibration.best(Budget(budget_macs), policies, off=frozenset())
            pixel_threshold = getattr(chosen.policy, "pixel_threshold", None)
            numbers = chosen.policy.thresholds, pixel_threshold
            if numbers in points:
                continue
            reached = test.measure(chosen.policy)
            points[numbers] = FrontierPoint(
                budget_macs=budget_macs,
                thresholds=chosen.policy.thresholds,
                calibration_accuracy=chosen.accuracy,
                accuracy=reached.accuracy,
                mean_macs=reached.mean_macs,
                calibration_mean_iou=chosen.mean_iou,
                mean_iou=reached.mean_iou,
                pixel_threshold=pixel_threshold,
            )
    return list(points.values())


def _area(points: Sequence[FrontierPoint], *, plain_macs: int) -> float:
    """Mean accuracy over all costs from the cheapest point's to the plain network's."""
    by_cost = sorted(points, key=lambda point: point.mean_macs)
    best, least_macs = by_cost[0], by_cost[0].mean_macs
    if least_macs >= plain_macs:
        return best.quality
    total = 0.0
    ends = [min(point.mean_macs, plain_macs) for point in by_cost] + [plain_macs]
    for point, (start, end) in zip(by_cost, pairwise(ends), strict=True):
        if _on_calibration(point) > _on_calibration(best):
            best = point
        total += best.quality * (end - start)
    return total / (plain_macs - least_macs)


def _on_calibration(point: FrontierPoint) -> float:
    if point.calibration_mean_iou is not None:
        return point.calibration_mean_iou
    return -math.inf if point.calibration_accuracy is None else point.calibration_accuracy


def _without_dense(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures without those of dense outputs where a sample has one class."""
    return {
        name: value
        for name, value in figures.items()
        if value is not None or not name.endswith(("mean_iou", "pixel_threshold"))
    }
