import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up_logits import THREE_COSTS, three_exits
from scipy.stats import binom

import offramp.calibration.sequence as sequence_module
from offramp.calibration.collect import ExitLogits
from offramp.calibration.guarantee import calibrate_with_guarantee
from offramp.calibration.risk import RISKS
from offramp.calibration.search import exits_left_by
from offramp.calibration.sequence import part_samples
from offramp.calibration.thresholds import confidences
from offramp.errors import DataError, InfeasibleTargetError, InvalidArgumentError, ShapeError
from offramp.measure.exit_costs import ExitCosts
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy

DRAWS = 100

no_cover = pytest.mark.no_cover  # tests below run the same lines, once each


def population(seed: int = 0, num_samples: int = 4000) -> ExitLogits:
    return three_exits(seed, num_samples, signal=(1.5, 2.5, 4.0), noise=1.0)


def true_risk(logits: ExitLogits, policy, risk: str) -> float:
    exit_N = exits_left_by(confidences(logits, policy, policy.off_exits), policy.thresholds)
    losses_KN = RISKS[risk].losses(logits)
    return float(np.average(losses_KN[exit_N, np.arange(len(exit_N))], weights=logits.weights_N))


def draws_of(pool: ExitLogits, size: int, count: int):
    for seed in range(count):
        yield pool.take(np.random.default_rng(seed).integers(0, len(pool.labels_N), size))


POOL = population()


# What is promised is kept


def count_violations(pool, *, size, risk, target, level, count=DRAWS):
    violations = infeasible = 0
    for logits in draws_of(pool, size, count):
        try:
            found = calibrate_with_guarantee(
                logits, max_risk=target, risk=risk, guarantee=level, rule="max_probability"
            )
        except InfeasibleTargetError:
            infeasible += 1
        else:
            violations += true_risk(pool, found.policy, risk) > target + 1e-12
    return violations, infeasible


def is_excessive(violations: int, *, delta: float, count: int = DRAWS) -> bool:
    return bool(binom.sf(violations - 1, count, delta) < 0.01 / 8)


@no_cover
@pytest.mark.parametrize(
    ("risk", "target"),
    [("accuracy_gap", 0.02), ("disagreement", 0.05), ("error", 0.1), ("brier_gap", 0.02)],
)
def test_promise_is_kept_on_the_population(risk, target):
    violations, infeasible = count_violations(POOL, size=400, risk=risk, target=target, level=0.8)
    assert not is_excessive(violations, delta=0.2)
    assert infeasible < DRAWS / 2


@no_cover
def test_policies_at_the_boundary_are_seldom_taken():
    """Every early exit disagrees a little more often than the target allows, however sure it is."""
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([3 + torch.rand(20_000, generator=generator), torch.zeros(20_000)], 1)
    differs = torch.arange(20_000) < 0.0505 * 20_000
    final = torch.where(differs[:, None], first.flip(1), first)
    pool = ExitLogits(
        logits_KNC=torch.stack([first, final]),
        labels_N=torch.zeros(20_000, dtype=torch.int64),
        costs=ExitCosts(stage_macs=(100, 100), head_macs=(10, 10)),
    )
    violations = 0
    for logits in draws_of(pool, 300, 2 * DRAWS):
        found = calibrate_with_guarantee(
            logits, max_risk=0.05, risk="disagreement", guarantee=0.8, rule="max_probability"
        )
        violations += true_risk(pool, found.policy, "disagreement") > 0.05
    assert not is_excessive(violations, delta=0.2, count=2 * DRAWS)
    assert violations > 2  # it sits on the boundary indeed


@no_cover
@pytest.mark.parametrize("seed", [8, 9])
def test_losses_that_go_with_the_confidence_are_no_way_around(seed):
    """Exit 0 is wrong where the final exit is least sure: a split by ranks would hide that."""
    generator = torch.Generator().manual_seed(0)
    sure = torch.linspace(0, 1, 20_000)
    final = torch.stack([3 + 3 * sure, torch.zeros(20_000)], 1)
    first = torch.stack([3 + torch.rand(20_000, generator=generator), torch.zeros(20_000)], 1)
    first[sure < 0.0501] = first[sure < 0.0501].flip(1)
    pool = ExitLogits(
        logits_KNC=torch.stack([first, final]),
        labels_N=torch.zeros(20_000, dtype=torch.int64),
        costs=ExitCosts(stage_macs=(100, 100), head_macs=(10, 10)),
    )
    violations = 0
    for logits in draws_of(pool, 500, DRAWS):
        found = calibrate_with_guarantee(logits, max_risk=0.05, guarantee=0.9, seed=seed)
        violations += true_risk(pool, found.policy, "accuracy_gap") > 0.05
    assert not is_excessive(violations, delta=0.1)


@no_cover
def test_a_broken_bound_is_caught(monkeypatch):
    """With the mean in place of its p-value, the test above must fail."""

    def mean_is_enough(losses_N, max_risk, **_):
        return 0.0 if losses_N.mean() <= max_risk else 1.0

    monkeypatch.setattr(sequence_module, "trinomial_p_value", mean_is_enough)
    violations, _ = count_violations(
        POOL, size=400, risk="accuracy_gap", target=0.02, level=0.95, count=100
    )
    assert is_excessive(violations, delta=0.05, count=100)


@no_cover
def test_promise_on_average_is_kept_on_average():
    risks = []
    for logits in draws_of(POOL, 300, DRAWS):
        found = calibrate_with_guarantee(
            logits, max_risk=0.05, risk="disagreement", guarantee="mean", rule="max_probability"
        )
        risks.append(true_risk(POOL, found.policy, "disagreement"))
    assert np.mean(risks) <= 0.05 + 2 * np.std(risks) / DRAWS**0.5
    assert max(risks) > 0.05  # single draws may be above


@no_cover
def test_promise_about_another_prior_is_kept_there():
    """Half of the calibration samples are of class 0, of which the population has a tenth."""
    prior = (0.1, 0.3, 0.3, 0.3)
    # Class 0 is the easy one: ignoring the weights would promise too much.
    pool = population(1, num_samples=8000)
    harder = pool.logits_KNC.clone()
    harder[:2, pool.labels_N != 0] *= 0.4
    harder[:2, pool.labels_N == 0] += torch.tensor([3.0, 0, 0, 0])
    pool = replace(pool, logits_KNC=harder)
    of_class = [np.flatnonzero(pool.labels_N.numpy() == c) for c in range(4)]
    truth = replace(pool, prior=prior)
    violations = {"weighted": 0, "as drawn": 0}
    for seed in range(100):
        generator = np.random.default_rng(seed)
        rows = [generator.choice(of_class[c], n) for c, n in enumerate((300, 100, 100, 100))]
        drawn = pool.take(np.concatenate(rows))
        for name, logits in (("weighted", replace(drawn, prior=prior)), ("as drawn", drawn)):
            found = calibrate_with_guarantee(
                logits, max_risk=0.05, risk="disagreement", guarantee=0.8, rule="max_probability"
            )
            violations[name] += true_risk(truth, found.policy, "disagreement") > 0.05
    assert not is_excessive(violations["weighted"], delta=0.2, count=100)
    assert is_excessive(violations["as drawn"], delta=0.2, count=100)


# What it says


def test_says_what_it_rests_on():
    found = calibrate_with_guarantee(POOL, max_risk=0.02, guarantee=0.95)
    promise = found.guarantee
    assert (promise.risk, promise.max_risk, promise.probability) == ("accuracy_gap", 0.02, 0.95)
    assert (promise.num_samples, promise.num_tested, promise.num_finding) == (4000, 2800, 1200)
    assert promise.effective_num_samples == 2800
    assert (promise.method, promise.value <= 0.05) == ("exact trinomial", True)
    assert 1 < promise.num_passed < promise.num_candidates
    assert promise.sentence("a town") == (
        "With probability at least 95 % over the draw of 4,000 calibration samples (a town), early "
        "exit loses at most 2 percentage points of accuracy against the final exit on new samples "
        "drawn alike."
    )
    whole = POOL.measure(found.policy)
    assert (found.accuracy, found.mean_macs) == (whole.accuracy, whole.mean_macs)
    assert found.mean_macs < THREE_COSTS.plain_macs


@pytest.mark.parametrize(
    ("risk", "prior", "guarantee", "method"),
    [
        ("accuracy_gap", None, 0.9, "exact trinomial"),
        ("accuracy_gap", (0.25,) * 4, 0.9, "betting"),
        ("disagreement", None, 0.9, "exact binomial"),
        ("error", None, 0.9, "exact binomial"),
        ("brier_gap", None, 0.9, "betting"),
        ("disagreement", (0.25,) * 4, 0.9, "betting"),
        ("disagreement", None, "mean", "conformal risk control"),
    ],
)
def test_takes_the_test_that_fits(risk, prior, guarantee, method):
    logits = replace(POOL, prior=prior)
    found = calibrate_with_guarantee(logits, max_risk=0.2, risk=risk, guarantee=guarantee)
    assert found.guarantee.method == method


def test_equal_counts_of_classes_are_tested_exactly():
    rows = [np.flatnonzero(POOL.labels_N.numpy() == c)[:500] for c in range(4)]
    logits = replace(POOL.take(np.concatenate(rows)), prior=(0.25,) * 4)
    found = calibrate_with_guarantee(logits, max_risk=0.1, risk="disagreement")
    assert found.guarantee.method == "exact binomial"
    assert found.guarantee.effective_num_samples == found.guarantee.num_tested == 1400


def test_weights_cost_effective_samples():
    skewed = replace(POOL, prior=(0.85, 0.05, 0.05, 0.05))
    found = calibrate_with_guarantee(skewed, max_risk=0.2, risk="disagreement")
    assert found.guarantee.effective_num_samples < 0.6 * found.guarantee.num_tested


def test_policies_of_every_kind_get_a_promise():
    def tempered(logits):
        seen.append(len(logits.labels_N))
        return ThresholdPolicy((0.5, 0.5), temperatures=(2.0, 1.0, 0.5))

    seen = []
    for rule in ("margin", PatiencePolicy(2, 3), tempered):
        found = calibrate_with_guarantee(POOL, max_risk=0.02, rule=rule)
        assert true_risk(POOL, found.policy, "accuracy_gap") < 0.02
    assert found.policy.temperatures == (2.0, 1.0, 0.5)
    assert seen == [1200]  # never the samples that test


# What finds the candidates, and what tests them


def disturbed(logits: ExitLogits, seed: int = 0) -> ExitLogits:
    """As another processor would give them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(logits.logits_KNC.shape, generator=generator)
    return replace(logits, logits_KNC=logits.logits_KNC + 1e-6 * noise)


@pytest.mark.parametrize("prior", [None, (0.25,) * 4])
def test_bits_of_logits_do_not_part_the_samples(prior):
    numbered = replace(POOL, labels_N=POOL.labels_N.clone(), prior=prior)
    numbered.logits_KNC[0, :, 0] = torch.arange(4000)  # tells the samples apart below
    other = replace(numbered, logits_KNC=numbered.logits_KNC.clone())
    other.logits_KNC[1:] += 1
    halves = [part_samples(each, 3)[0].logits_KNC[0, :, 0] for each in (numbered, other)]
    assert torch.equal(*halves)
    assert not torch.equal(halves[0], part_samples(numbered, 4)[0].logits_KNC[0, :, 0])
    relabelled = replace(numbered, labels_N=numbered.labels_N.flip(0))
    assert not torch.equal(halves[0], part_samples(relabelled, 3)[0].logits_KNC[0, :, 0])


@pytest.mark.parametrize("is_half", [True, False])
@pytest.mark.parametrize("prior", [None, (0.25,) * 4])
def test_noise_in_the_last_bits_moves_nothing(prior, is_half):
    pool = replace(POOL, prior=prior)
    if is_half:  # as files hold them: many answers and confidences are tied then
        pool = replace(pool, logits_KNC=(4 * pool.logits_KNC).round() / 4)
    for seed in range(3):
        found, again = (
            calibrate_with_guarantee(each, max_risk=0.02, seed=seed)
            for each in (pool, disturbed(pool))
        )
        assert found.mean_macs == pytest.approx(again.mean_macs, abs=0.005 * THREE_COSTS.plain_macs)


def test_all_samples_test_where_others_find():
    elsewhere = population(5, 3000)
    found = calibrate_with_guarantee(POOL, max_risk=0.02, finding=elsewhere)
    promise = found.guarantee
    assert (promise.num_samples, promise.num_tested, promise.num_finding) == (4000, 4000, 3000)
    assert (found.accuracy, found.mean_macs) == (
        *(
            POOL.measure(found.policy).accuracy,
            POOL.measure(found.policy).mean_macs,
        ),
    )


def test_what_tests_never_shapes_the_candidates():
    elsewhere, seen = population(5, 1000), []

    def rule(logits):
        seen.append(logits)
        return ThresholdPolicy((0.5, 0.5))

    counts = {
        calibrate_with_guarantee(
            population(seed, 2000), max_risk=0.05, finding=elsewhere, rule=rule
        ).guarantee.num_candidates
        for seed in (7, 8)
    }
    assert len(counts) == 1
    assert all(logits is elsewhere for logits in seen)


def test_seed_and_order_decide_nothing_where_others_find():
    elsewhere = population(5, 3000)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    for prior in (None, (0.25,) * 4):
        pool = replace(POOL, prior=prior)
        thresholds = {
            calibrate_with_guarantee(
                each, max_risk=0.02, finding=elsewhere, seed=seed
            ).policy.thresholds
            for each in (pool, pool.take(order))
            for seed in range(3)
        }
        assert len(thresholds) == 1


def test_samples_that_find_and_test_are_refused():
    for shared in (POOL, POOL.take(range(100)), POOL.take(range(3950, 4000))):
        with pytest.raises(DataError, match="not among those that test"):
            calibrate_with_guarantee(POOL, max_risk=0.05, finding=shared)
    # A few that are equal by chance are none.
    elsewhere = population(5, 3000)
    some = elsewhere.take([*range(2960), *range(40)])
    few = POOL.take([0, 1, 2, *range(500)])
    rest = replace(
        elsewhere,
        logits_KNC=torch.cat([some.logits_KNC, few.logits_KNC[:, :3]], 1),
        labels_N=torch.cat([some.labels_N, few.labels_N[:3]]),
    )
    calibrate_with_guarantee(POOL, max_risk=0.05, finding=rest)


def test_finding_of_another_network_is_refused():
    other = replace(POOL, costs=ExitCosts(stage_macs=(1, 1, 1), head_macs=(1, 1, 1)))
    with pytest.raises(InvalidArgumentError, match="same network"):
        calibrate_with_guarantee(population(3), max_risk=0.05, finding=other)
    two = replace(
        POOL,
        logits_KNC=POOL.logits_KNC[1:],
        costs=ExitCosts(stage_macs=(1, 1), head_macs=(1, 1)),
        numbers=(),
    )
    with pytest.raises(ShapeError, match="same exits"):
        calibrate_with_guarantee(population(3), max_risk=0.05, finding=two)


# What cannot be promised


def test_too_few_samples_say_how_many_would_do():
    few = POOL.take(range(100))
    with pytest.raises(InfeasibleTargetError, match="100 calibration samples") as caught:
        calibrate_with_guarantee(few, max_risk=0.01, risk="disagreement", guarantee=0.95)
    enough = int(re.search(r"about ([\d,]+) would do", str(caught.value))[1].replace(",", ""))
    # The binomial test passes without a loss once 0.99 to the power n is at most 0.05.
    least = math.ceil(math.log(0.05) / math.log(0.99))
    assert enough == pytest.approx(least / 0.7, rel=0.02)
    calibrate_with_guarantee(
        POOL.take(range(enough)), max_risk=0.01, risk="disagreement", guarantee=0.95
    )
    allowed = caught.value.best_achievable
    assert allowed == pytest.approx(1 - 0.05 ** (1 / 70), rel=0.01)
    calibrate_with_guarantee(few, max_risk=allowed, risk="disagreement", guarantee=0.95)


@pytest.mark.parametrize("guarantee", [0.95, "mean"])
def test_error_below_what_the_network_reaches_is_refused(guarantee):
    with pytest.raises(InfeasibleTargetError, match="no number of them would do") as caught:
        calibrate_with_guarantee(POOL, max_risk=0.001, risk="error", guarantee=guarantee)
    final_error = float(RISKS["error"].losses(POOL)[-1].mean())
    assert final_error - 0.01 < caught.value.best_achievable < final_error + 0.02


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_risk": 0.0},
        {"max_risk": 1.0},
        {"max_risk": math.nan},
        {"guarantee": 0.0},
        {"guarantee": 1.0},
        {"guarantee": math.nan},
        {"guarantee": "always"},
        {"guarantee": None},
        {"seed": -1},
        {"seed": 0.5},
        {"risk": "luck"},
        {"rule": "gini"},
        {"rule": PatiencePolicy(2, 5)},
    ],
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(InvalidArgumentError):
        calibrate_with_guarantee(POOL, **{"max_risk": 0.05, **wrong})


def test_average_over_uneven_weights_is_refused():
    with pytest.raises(InvalidArgumentError, match="weigh the same"):
        calibrate_with_guarantee(
            replace(POOL, prior=(0.7, 0.1, 0.1, 0.1)), max_risk=0.1, guarantee="mean"
        )


def test_one_sample_and_one_of_a_class_are_refused():
    with pytest.raises(InvalidArgumentError, match="at least 2 samples"):
        calibrate_with_guarantee(POOL.take([0]), max_risk=0.1)
    lonely = np.append(np.flatnonzero(POOL.labels_N.numpy() != 0)[:50], 0)
    first = np.flatnonzero(POOL.labels_N.numpy() == 0)[0]
    lonely[-1] = first
    with pytest.raises(InvalidArgumentError, match="2 of each class"):
        calibrate_with_guarantee(
            replace(POOL, prior=(0.25,) * 4).take(lonely), max_risk=0.1, risk="error"
        )
    with pytest.raises(DataError, match="none of 1 classes, class 0"):
        replace(POOL, prior=(0.25,) * 4).take(lonely[:-1])


# Edge cases


def test_nothing_right_is_refused_however_many_samples_there_are():
    wrong = replace(POOL, labels_N=(POOL.logits_KNC[-1].argmax(-1) + 1) % 4, prior=(0.25,) * 4)
    with pytest.raises(InfeasibleTargetError, match="no number of them"):
        calibrate_with_guarantee(wrong, max_risk=0.01, risk="error")


def test_samples_that_weigh_nothing_take_no_part():
    without_class_0 = replace(POOL, prior=(0.0, 0.4, 0.3, 0.3))
    found = calibrate_with_guarantee(without_class_0, max_risk=0.1, risk="disagreement")
    counts = POOL.class_counts
    assert found.guarantee.num_tested == pytest.approx(0.7 * counts[1:].sum(), abs=3)


@pytest.mark.parametrize("num_samples", [40, 73, 150])
def test_the_target_that_is_offered_can_be_promised(num_samples):
    few = POOL.take(range(num_samples))
    with pytest.raises(InfeasibleTargetError) as caught:
        calibrate_with_guarantee(few, max_risk=0.001, risk="error")
    offered = re.search(r"can promise ([\d.]+)\.$", str(caught.value))[1]
    calibrate_with_guarantee(few, max_risk=float(offered), risk="error")


def test_one_exit_has_nothing_to_lose():
    costs = ExitCosts(stage_macs=(100,), head_macs=(10,))
    logits = ExitLogits(logits_KNC=POOL.logits_KNC[-1:], labels_N=POOL.labels_N, costs=costs)
    found = calibrate_with_guarantee(logits, max_risk=0.01)
    assert (found.policy.thresholds, found.mean_macs) == ((), 110)


def test_exits_that_are_all_right_are_used_and_those_all_wrong_are_not():
    right = torch.nn.functional.one_hot(POOL.labels_N, 4).float()
    spread = torch.linspace(1, 2, len(right))[:, None]
    for first, share in ((right, 1.0), (right.roll(1, dims=1), 0.0)):
        logits = replace(POOL, logits_KNC=torch.stack([first * spread, right, right]))
        found = calibrate_with_guarantee(logits, max_risk=0.01, risk="disagreement")
        left = confidences(logits, found.policy)[0] >= found.policy.thresholds[0]
        # A threshold between the least sure of those that find and of the others may keep a few.
        assert left.mean() == pytest.approx(share, abs=0.005)


def test_equal_confidences_leave_together_or_not_at_all():
    tied = torch.tensor([3.0, 0, 0, 0]).expand(3, 2000, 4).clone()
    tied[-1, :1000] = torch.tensor([0, 3.0, 0, 0])  # half of the tied ones would be lost
    logits = ExitLogits(
        logits_KNC=tied, labels_N=tied[-1].argmax(-1), costs=THREE_COSTS, numbers=(0, 1, 2)
    )
    found = calibrate_with_guarantee(logits, max_risk=0.1)
    assert true_risk(logits, found.policy, "accuracy_gap") == 0
