import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.calibration.collect import ExitLogits
from offramp.calibration.evidence import calibrate
from offramp.calibration.guarantee import calibrate_with_guarantee
from offramp.calibration.risk import RISKS_OF_SAMPLES
from offramp.calibration.search import evaluate_thresholds
from offramp.calibration.thresholds import confidences
from offramp.errors import InfeasibleTargetError
from offramp.measure.exit_costs import ExitCosts
from offramp.policy.confidence import CONFIDENCE_RULES

pytestmark = [
    # Values worked out by hand have few samples.
    pytest.mark.filterwarnings("ignore::offramp.errors.FewSamplesWarning"),
    # Unit tests run the same lines; here they run thousands of times.
    pytest.mark.no_cover,
]

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
    # Candidates are compared by expected correctness: nothing of that is lost.
    worth_KN = logits.expected_scores_KN
    confidence_KN = confidences(logits, found.policy)
    reached, _ = evaluate_thresholds(confidence_KN, worth_KN, logits.costs, found.policy.thresholds)
    assert reached >= worth_KN[-1].mean() - 1e-9


# Targets, order and names


def looser_pairs(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(sorted)


@given(answers(with_nan=True), looser_pairs(0, 0.99), st.sampled_from(RISKS_OF_SAMPLES))
def test_a_looser_target_never_costs_more(logits, targets, risk):
    costs = []
    for target in targets:
        try:
            costs.append(calibrate(logits, max_risk=target, risk=risk).mean_macs)
        except InfeasibleTargetError:
            costs.append(math.inf)
    tight, loose = costs
    # The search is no proof: it may miss a little at either target.
    assert loose <= tight * 1.05


def shuffled(logits: ExitLogits, seed: int) -> ExitLogits:
    return logits.take(np.random.default_rng(seed).permutation(len(logits.labels_N)))


def relabelled(logits: ExitLogits, seed: int) -> ExitLogits:
    """The same answers with the classes in another order."""
    new_names = torch.tensor(np.random.default_rng(seed).permutation(logits.logits_KNC.shape[2]))
    return replace(
        logits,
        logits_KNC=logits.logits_KNC[:, :, new_names.argsort()],
        labels_N=new_names[logits.labels_N],
    )


TARGETS = st.sampled_from(
    [{"max_drop": 0.1}, {"max_risk": 0.3, "risk": "disagreement"}, {"budget_share": 0.8}]
)


@given(answers(with_nan=True), TARGETS, st.integers(0, 100))
def test_order_of_the_samples_does_not_matter(logits, target, seed):
    assert outcome(logits, target) == outcome(shuffled(logits, seed), target)


@given(answers(with_nan=False), TARGETS, st.integers(0, 100))
def test_names_of_the_classes_do_not_matter(logits, target, seed):
    assert outcome(logits, target) == pytest.approx(outcome(relabelled(logits, seed), target))


def outcome(logits: ExitLogits, target) -> tuple[float, ...]:
    try:
        found = calibrate(logits, rule="max_probability", **target)
    except InfeasibleTargetError as error:
        return (error.best_achievable,)
    return (*found.policy.thresholds, found.accuracy, found.mean_macs)


@st.composite
def many_answers(draw):
    """Answers good enough to promise something about."""
    seed, num_samples = draw(st.integers(0, 2**16)), draw(st.integers(60, 200))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (num_samples,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, 3) * torch.tensor([2.0, 4.0])[:, None, None]
    logits = signal + torch.randn(2, num_samples, 3, generator=generator)
    prior = draw(st.sampled_from([None, (0.5, 0.25, 0.25)]))
    costs = ExitCosts(stage_macs=(10, 20), head_macs=(1, 2))
    return ExitLogits(logits_KNC=logits, labels_N=labels, costs=costs, prior=prior)


def promised(logits: ExitLogits, target: float, risk: str) -> float:
    """Mean MACs that a promise takes; infinite where none can be given."""
    try:
        found = calibrate_with_guarantee(
            logits, max_risk=target, risk=risk, guarantee=0.8, rule="max_probability"
        )
    except InfeasibleTargetError:
        return math.inf
    return found.mean_macs


@settings(max_examples=40)
@given(many_answers(), looser_pairs(0.01, 0.5), st.sampled_from(RISKS_OF_SAMPLES))
def test_a_looser_promise_never_costs_more(logits, targets, risk):
    tight, loose = (promised(logits, target, risk) for target in targets)
    # Further along the same candidates; on all samples, a next candidate may cost a little more.
    assert loose <= tight * 1.1 or tight == math.inf


@settings(max_examples=40)
@given(many_answers(), st.integers(0, 100), st.sampled_from(RISKS_OF_SAMPLES))
def test_the_last_bits_of_logits_do_not_matter_for_a_promise(logits, seed, risk):
    noise = torch.randn(logits.logits_KNC.shape, generator=torch.Generator().manual_seed(seed))
    noisy = replace(logits, logits_KNC=logits.logits_KNC + 1e-6 * noise)
    assert promised(logits, 0.2, risk) == pytest.approx(promised(noisy, 0.2, risk), rel=0.02)


@settings(max_examples=40)
@given(answers(with_nan=False), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_a_prior_is_as_good_as_repeating_samples(logits, times):
    """Weights by class decide as if the samples of a class were there several times."""
    counts = np.bincount(logits.labels_N, minlength=3)
    wanted = counts * times
    if not wanted.sum():
        return
    weighted = replace(logits, prior=tuple((wanted / wanted.sum()).tolist()))
    repeated = logits.take(
        np.repeat(np.arange(len(logits.labels_N)), np.array(times)[logits.labels_N])
    )
    target = {"max_risk": 0.25, "risk": "error"}
    found = [outcome(each, target)[-1] for each in (weighted, repeated)]
    assert found[0] == pytest.approx(found[1], rel=0.05)
