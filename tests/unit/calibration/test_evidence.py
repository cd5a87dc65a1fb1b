"""One way of choosing for all evidence: exits, pixels, gates and halting tokens."""

from dataclasses import replace

import pytest
import torch
from made_up_logits import THREE_COSTS, three_exits

import offramp
from offramp import (
    DenseLogits,
    GatePolicy,
    HaltingPolicy,
    InfeasibleTargetError,
    InSampleError,
    InvalidArgumentError,
    Sweep,
    calibrate,
    calibrate_with_guarantee,
    frontier,
)
from offramp.errors import DataError, FewSamplesWarning
from offramp.measure.dense import confusion_matrices, label_maps
from offramp.measure.outputs import MAPS

THRESHOLDS = {GatePolicy: (0.9, 0.5, 0.0), HaltingPolicy: (0.2, 0.6, 1.0)}


def of_exits(seed, num_samples=400):
    return three_exits(seed, num_samples)


def of_pixels(seed, num_samples=40):
    """Three exits, each better than the one before, about images of 4 by 4 pixels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (num_samples, 4, 4), generator=generator)
    wanted = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    noise = torch.randn(3, *wanted.shape, generator=generator)
    logits = (noise + torch.tensor([1.0, 1.6, 2.2]).reshape(3, 1, 1, 1, 1) * wanted).half()
    masks = labels.to(torch.uint8)
    confusion = [
        confusion_matrices(label_maps(each.float(), (4, 4)), masks, num_classes=3)
        for each in logits
    ]
    return DenseLogits(
        logits_KNC=logits,
        labels_N=masks,
        confusion_KNCC=torch.stack(confusion),
        costs=THREE_COSTS,
    )


def of_thresholds(policy):
    """The answers of three exits as those at three thresholds; some samples cost more."""

    def make(seed, num_samples=400):
        exits = three_exits(seed, num_samples)
        macs_KN = torch.tensor([120, 275, 465])[:, None] + torch.arange(num_samples) % 3
        return Sweep(
            logits_KNC=exits.logits_KNC,
            labels_N=exits.labels_N,
            thresholds=THRESHOLDS[policy],
            macs_KN=macs_KN,
            plain_macs=460,
            policy=policy,
        )

    return make


KINDS = {
    "exits": of_exits,
    "pixels": of_pixels,
    "gates": of_thresholds(GatePolicy),
    "tokens": of_thresholds(HaltingPolicy),
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


@pytest.fixture
def evidence(make):
    return make(0)


@pytest.fixture
def risk(evidence):
    """The risk that can be promised."""
    return "pixel_error_gap" if evidence.outputs is MAPS else "accuracy_gap"


@pytest.mark.parametrize("drop", [0.0, 0.05, 0.3])
def test_a_drop_is_kept_and_more_of_it_costs_no_more(evidence, drop):
    chosen = calibrate(evidence, max_drop=drop)
    assert chosen.final_exit.quality - chosen.quality <= drop + 1e-9
    assert chosen.mean_macs <= calibrate(evidence, max_drop=0.0).mean_macs + 1e-9
    assert chosen == evidence.measure(chosen.policy)
    assert (chosen.asked.target, chosen.asked.limit) == ("max_drop", drop)
    assert (chosen.num_samples, chosen.plain_macs) == (len(evidence.labels_N), evidence.plain_macs)


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_budget_is_kept_and_more_of_it_is_no_worse(evidence, share):
    chosen = calibrate(evidence, budget_share=share)
    assert chosen.mean_macs <= share * evidence.plain_macs + 1e-6
    assert chosen == calibrate(evidence, budget_macs=share * evidence.plain_macs)
    assert chosen.quality <= calibrate(evidence, budget_share=2.0).quality + 0.02


def test_a_budget_below_the_cheapest_names_it(evidence):
    with pytest.raises(InfeasibleTargetError, match="the cheapest there is") as caught:
        calibrate(evidence, budget_macs=1)
    least = evidence.least_macs(evidence.policies(None))
    assert caught.value.best_achievable == pytest.approx(least)
    assert calibrate(evidence, budget_macs=least).mean_macs == pytest.approx(least)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "exactly one target"),
        ({"max_drop": 0.1, "budget_share": 0.5}, "exactly one target"),
        ({"max_drop": 1.0}, "'max_drop' parameter must be a fraction"),
        ({"max_risk": -0.1}, "'max_risk' parameter must be a fraction"),
        ({"max_risk": 0.1, "risk": "ruin"}, "must be one of .* Got 'ruin'"),
        ({"budget_macs": float("inf")}, "'budget_macs' parameter must be finite"),
        ({"budget_share": 0.0}, "'budget_share' parameter"),
    ],
)
def test_targets_are_checked(evidence, target, message):
    with pytest.raises(InvalidArgumentError, match=message):
        calibrate(evidence, **target)


def test_a_risk_of_other_outputs_is_refused(evidence):
    other = "error" if evidence.outputs is MAPS else "pixel_error_gap"
    with pytest.raises(InvalidArgumentError, match="every pixel"):
        calibrate(evidence, max_risk=0.1, risk=other)
    with pytest.raises(InvalidArgumentError, match="every pixel"):
        calibrate_with_guarantee(evidence, max_risk=0.1, risk=other)


@pytest.mark.parametrize("kind", ["exits", "gates", "tokens"])
def test_few_samples_warn(kind):
    with pytest.warns(FewSamplesWarning, match="use calibrate_with_guarantee"):
        calibrate(KINDS[kind](0, 20), max_drop=0.01)


@pytest.mark.parametrize("kind", ["gates", "tokens"])
@pytest.mark.parametrize("given", [{"rule": "margin"}, {"off": frozenset({0})}])
def test_what_is_about_exits_is_refused_of_one_threshold(kind, given):
    with pytest.raises(InvalidArgumentError, match=f"'{next(iter(given))}' parameter is about ex"):
        calibrate(KINDS[kind](0), max_drop=0.1, **given)


def test_kind_of_policy_follows_from_the_order_of_thresholds():
    for kind, policy in (("gates", GatePolicy), ("tokens", HaltingPolicy)):
        unnamed = replace(KINDS[kind](0), policy=None)
        assert calibrate(unnamed, max_drop=0.5).policy == policy(THRESHOLDS[policy][0])


# A promise


@pytest.mark.parametrize("guarantee", [0.9, "mean"])
@pytest.mark.parametrize("is_found_elsewhere", [True, False])
def test_a_promise_is_of_one_of_the_candidates_and_rests_on_all_samples(
    make, evidence, risk, guarantee, is_found_elsewhere
):
    finding = make(1) if is_found_elsewhere else None
    chosen = calibrate_with_guarantee(
        evidence, max_risk=0.3, risk=risk, guarantee=guarantee, finding=finding
    )
    assert chosen == replace(evidence.measure(chosen.policy), guarantee=chosen.guarantee)
    promise = chosen.guarantee
    assert promise.num_samples == len(evidence.labels_N)
    assert 1 <= promise.num_passed <= promise.num_candidates
    if is_found_elsewhere or evidence.has_fixed_candidates:
        assert promise.num_tested == promise.num_samples
    else:
        assert promise.num_tested + promise.num_finding == promise.num_samples
    assert "promise" in str(chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_risk": 0.0}, "above 0"),
        ({"max_risk": 0.1, "guarantee": 1.0}, "probability in"),
        ({"max_risk": 0.1, "risk": "ruin"}, "Got 'ruin'"),
    ],
)
def test_promises_are_checked(evidence, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        calibrate_with_guarantee(evidence, **options)


def test_samples_that_may_not_promise_are_refused(make, evidence, risk):
    with pytest.raises(DataError, match="not among those that test"):
        calibrate_with_guarantee(evidence, max_risk=0.3, risk=risk, finding=evidence)
    seen = replace(evidence, checkpoint_chosen_by="a callback")
    with pytest.raises(InSampleError, match="chose its checkpoint"):
        calibrate_with_guarantee(seen, max_risk=0.3, risk=risk)


# A curve, and other networks


def test_points_keep_their_budgets_and_are_judged_on_test(make, evidence):
    test = make(1)
    found = frontier(evidence, test, num_points=4)
    for point in found.points:
        chosen = calibrate(evidence, budget_macs=point.budget_macs)
        assert point.thresholds == chosen.policy.thresholds
        reached = test.measure(chosen.policy)
        assert (point.quality, point.mean_macs) == (reached.quality, reached.mean_macs)
    assert found.exits == test.alone()
    assert found.exits[-1].macs <= found.plain_macs == test.plain_macs
    with pytest.raises(InvalidArgumentError, match="num_points"):
        frontier(evidence, test, num_points=1)
    with pytest.raises(InvalidArgumentError, match="'calibration' parameter may be None for a net"):
        frontier(None, test)


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_of_another_kind_or_network_is_refused(evidence, kind):
    other = KINDS[kind](1)
    change = {"plain_macs": 99} if kind in ("gates", "tokens") else {"numbers": (0, 2, 3)}
    risk = "pixel_error_gap" if evidence.outputs is MAPS else "accuracy_gap"
    is_same = evidence.policies(None) == other.policies(None)
    for stranger in (replace(other, **change), *(() if is_same else (other,))):
        with pytest.raises(InvalidArgumentError, match=r"Expected (evidence|logits|sweeps) of"):
            frontier(evidence, stranger)
        with pytest.raises(InvalidArgumentError, match=r"Expected (evidence|logits|sweeps) of"):
            calibrate_with_guarantee(evidence, max_risk=0.3, risk=risk, finding=stranger)


# Names that were public


@pytest.mark.parametrize(
    ("name", "successor"),
    [
        ("choose_threshold", "calibrate"),
        ("choose_threshold_with_guarantee", "calibrate_with_guarantee"),
        ("collect_sweep", r"collect\(network, data, thresholds="),
    ],
)
def test_names_that_go_warn_and_still_stand_for_what_they_did(name, successor):
    with pytest.warns(DeprecationWarning, match=f"{name} goes .* use offramp.{successor}"):
        found = getattr(offramp, name)
    assert name not in offramp.__all__
    if name == "choose_threshold":
        assert found(KINDS["gates"](0), max_drop=0.5).threshold == 0.9
    if name == "choose_threshold_with_guarantee":
        assert found(KINDS["tokens"](0), max_risk=0.3).guarantee.max_risk == 0.3
