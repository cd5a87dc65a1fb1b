import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.calibration.collect import ExitLogits
from offramp.calibration.thresholds import calibrate
from offramp.errors import InfeasibleTargetError
from offramp.measure.cost import ExitCosts
from offramp.policy.confidence import CONFIDENCE_RULES

macs = st.integers(0, 100)
rules = st.sampled_from(sorted(CONFIDENCE_RULES))


@st.composite
def answers(draw, *, with_nan: bool):
    """Random logits of one to four exits with any costs; some NaN where asked for."""
    num_exits, num_samples = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits = 3 * torch.randn(num_exits, num_samples, 3, generator=generator)
    if with_nan:
        logits[torch.rand(num_exits, num_samples, generator=generator) < 0.2] = math.nan
    costs = ExitCosts(
        stage_macs=tuple(draw(macs.map(lambda m: m + 1)) for _ in range(num_exits)),
        head_macs=tuple(draw(macs) for _ in range(num_exits)),
    )
    labels = torch.randint(0, 3, (num_samples,), generator=generator)
    return ExitLogits(logits_KNC=logits, labels_N=labels, costs=costs)


@given(answers(with_nan=True), st.floats(0, 0.99), rules)
def test_drop_can_always_be_kept_at_no_more_than_the_plain_cost(logits, max_drop, rule):
    found = calibrate(logits, max_drop=max_drop, rule=rule)
    final = float(logits.correct_KN[-1].double().mean())
    assert found.accuracy >= final - max_drop - 1e-9
    assert found.mean_macs <= logits.costs.plain_macs
    assert found.policy.num_exits == logits.costs.num_exits


def cheapest_exit(costs: ExitCosts) -> int:
    stages = [sum(costs.stage_macs[: k + 1]) for k in range(costs.num_exits)]
    return min(stage + head for stage, head in zip(stages, costs.head_macs, strict=True))


@given(answers(with_nan=False), st.floats(0, 1), rules)
def test_budget_from_the_cheapest_exit_on_is_kept(logits, share, rule):
    cheapest = cheapest_exit(logits.costs)
    budget = cheapest + share * (logits.costs.plain_macs - cheapest)
    assert calibrate(logits, budget_macs=budget, rule=rule).mean_macs <= budget + 1e-9


@given(answers(with_nan=True), st.floats(0, 2))
def test_budget_is_kept_or_refused_with_nan_too(logits, share):
    budget = share * logits.costs.plain_macs
    try:
        is_kept = calibrate(logits, budget_macs=budget).mean_macs <= budget + 1e-9
    except InfeasibleTargetError as error:
        is_kept = error.best_achievable > budget
    assert is_kept


@given(answers(with_nan=False), st.floats(1, 3))
def test_more_budget_than_the_plain_network_needs_loses_nothing(logits, factor):
    found = calibrate(logits, budget_macs=factor * logits.costs.plain_macs)
    final = float(logits.correct_KN[-1].double().mean())
    assert found.accuracy >= final - 1e-9
