import json
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from offramp.calibration.collect import ExitLogits
from offramp.calibration.temperature import describe_temperatures, fit_temperatures, reached
from offramp.errors import InvalidArgumentError, ShapeError
from offramp.measure.exit_costs import ExitCosts

INF, NAN = math.inf, math.nan
LOG_3 = math.log(3)


def exits(*logits_NC: torch.Tensor, labels, **rest) -> ExitLogits:
    """What each exit says, one argument an exit."""
    costs = ExitCosts(stage_macs=(10,) * len(logits_NC), head_macs=(1,) * len(logits_NC))
    labels_N = torch.as_tensor(labels)
    return ExitLogits(logits_KNC=torch.stack(logits_NC), labels_N=labels_N, costs=costs, **rest)


def planted(temperature: float, *, num_samples: int = 20_000, num_classes: int = 5, seed: int = 0):
    """Logits, and labels drawn from their softmax at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(num_samples, num_classes, generator=generator)
    p = (z / temperature).softmax(-1)
    return z, torch.multinomial(p, 1, generator=generator)[:, 0]


def gap(*odds: float) -> torch.Tensor:
    """Rows of two classes, class 0 ahead by the given logit."""
    ahead = torch.tensor(odds)
    return torch.stack([ahead, torch.zeros_like(ahead)], 1)


# fit_temperatures


def test_temperature_by_hand():
    # Right three times in four is odds of 3; a gap of log 3 says just that, half of it at 1/2.
    labels = [0, 0, 1, 0]
    logits = exits(gap(*[LOG_3] * 4), gap(*[2 * LOG_3] * 4), gap(*[LOG_3 / 2] * 4), labels=labels)
    assert fit_temperatures(logits) == pytest.approx((1, 2, 0.5), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 6.0])
def test_planted_temperature_is_found(temperature):
    z, labels = planted(temperature)
    (found,) = fit_temperatures(exits(z, labels=labels))
    assert found == pytest.approx(temperature, rel=0.05)


@given(st.integers(0, 2**16), st.floats(0.1, 8))
def test_no_temperature_of_a_grid_is_better(seed, temperature):
    z, labels = planted(temperature, num_samples=60, seed=seed)
    (found,) = fit_temperatures(exits(z, labels=labels))

    def loss(t: float) -> float:
        return float(F.cross_entropy(z.double() / t, labels))

    assert 0.05 <= found <= 20
    assert loss(found) <= min(loss(t) for t in np.geomspace(0.05, 20, 200)) + 1e-9


def test_temperature_grows_with_the_logits():
    z, labels = planted(1.5, num_samples=500)
    once, thrice = fit_temperatures(exits(z, 3 * z, labels=labels))
    assert thrice == pytest.approx(3 * once, rel=1e-4)


def test_exits_that_are_always_right_or_always_wrong_stay_at_the_bounds():
    right = gap(0.5, 2.0, 4.0)
    logits = exits(right, right.flip(1), labels=[0, 0, 0])
    assert fit_temperatures(logits) == (0.05, 20)


@pytest.mark.parametrize("value", [0.0, -7.5, NAN, INF, -INF])
def test_exit_that_says_nothing_stays_as_it_is(value):
    nothing = torch.full((4, 3), value)
    assert fit_temperatures(exits(nothing, labels=[0, 1, 2, 0])) == (1,)


def test_nan_and_impossible_labels_are_left_out():
    z, labels = planted(2.0, num_samples=200)
    alone = fit_temperatures(exits(z[:150], labels=labels[:150]))
    spoilt = z.clone()
    spoilt[150:170, 0] = NAN
    spoilt[170:180] = INF
    spoilt[torch.arange(180, 200), labels[180:]] = -INF
    assert fit_temperatures(exits(spoilt, labels=labels)) == pytest.approx(alone)


def test_classes_that_are_impossible_and_not_the_label_count_as_any_other():
    logits = torch.cat([gap(*[2 * LOG_3] * 4), torch.full((4, 1), -INF)], 1)
    assert fit_temperatures(exits(logits, labels=[0, 0, 1, 0])) == pytest.approx((2,), rel=1e-4)


@pytest.mark.parametrize(("size", "expected"), [(1e-30, 1), (1e-3, 0.05), (1e30, 20)])
def test_logits_of_any_size_are_borne(size, expected):
    z, labels = planted(1.0, num_samples=100)
    (found,) = fit_temperatures(exits(size * z, labels=labels))
    assert found == expected


def test_each_exit_has_its_own():
    z, labels = planted(2.0, num_samples=400)
    both = fit_temperatures(exits(z, z.flip(1), labels=labels))
    assert both[0] != both[1]
    assert both == (
        *fit_temperatures(exits(z, labels=labels)),
        *fit_temperatures(exits(z.flip(1), labels=labels)),
    )


def test_weights_count_as_repetition():
    # Class 1 is a fifth of the samples, and half of the population: four times its weight.
    z, labels = planted(3.0, num_samples=200, num_classes=2)
    rows = torch.cat([(labels == 0).nonzero()[:80, 0], (labels == 1).nonzero()[:20, 0]])
    z, labels = z[rows], labels[rows]
    times = torch.where(labels == 1, 4, 1)
    weighted = exits(z, labels=labels, prior=(0.5, 0.5))
    repeated = exits(z.repeat_interleave(times, 0), labels=labels.repeat_interleave(times))
    temperatures = fit_temperatures(weighted)
    assert temperatures == pytest.approx(fit_temperatures(repeated), rel=1e-4)
    assert temperatures != pytest.approx(fit_temperatures(exits(z, labels=labels)), rel=1e-2)
    of_weighted, of_repeated = (
        describe_temperatures(logits, temperatures)[0] for logits in (weighted, repeated)
    )
    for figure in ("brier_before", "brier_after", "ece_before", "ece_after", "auroc"):
        expected = getattr(of_repeated, figure)
        assert getattr(of_weighted, figure) == pytest.approx(expected), figure


@given(st.integers(0, 2**16))
def test_order_of_samples_and_names_of_classes_do_not_matter(seed):
    z, labels = planted(2.0, num_samples=50, seed=seed)
    (expected,) = fit_temperatures(exits(z, labels=labels))
    shuffled, named = torch.randperm(50), torch.randperm(5)
    reordered = exits(z[shuffled], labels=labels[shuffled])
    renamed = exits(z[:, named], labels=named.argsort()[labels])
    assert fit_temperatures(reordered) == pytest.approx((expected,), rel=1e-4)
    assert fit_temperatures(renamed) == pytest.approx((expected,), rel=1e-4)


def test_nothing_is_left_to_chance_or_changed():
    z, labels = planted(2.0, num_samples=300)
    logits = exits(z, labels=labels)
    before = logits.logits_KNC.clone()
    assert fit_temperatures(logits) == fit_temperatures(logits)
    assert torch.equal(logits.logits_KNC, before)


def test_many_samples_take_seconds_at_most():
    z, labels = planted(2.0, num_classes=47)
    start = time.perf_counter()
    fit_temperatures(exits(*[z] * 5, labels=labels))
    assert time.perf_counter() - start < 5  # half a second on two idle cores


# Survivors


def easy_and_hard(num_samples: int = 20_000):
    """An exit whose logits are right as they are for the first half, four times too sure after."""
    easy, easy_labels = planted(1.0, num_samples=num_samples // 2, seed=1)
    hard, hard_labels = planted(4.0, num_samples=num_samples // 2, seed=2)
    is_hard = np.arange(num_samples) >= num_samples // 2
    return torch.cat([easy, hard]), torch.cat([easy_labels, hard_labels]), is_hard


def test_exit_is_fitted_on_the_samples_that_reach_it():
    z, labels, is_hard = easy_and_hard()
    logits = exits(z, z, labels=labels)
    confidence = np.stack([np.where(is_hard, 0.2, 0.9), np.zeros(len(labels))])
    of_all = fit_temperatures(logits)
    of_survivors = fit_temperatures(logits, reached_KN=reached(confidence, (0.5,)))
    assert of_all[0] == of_all[1] == of_survivors[0]
    assert of_all[1] < 3
    assert of_survivors[1] == pytest.approx(4, rel=0.05)
    assert of_survivors[1] == fit_temperatures(exits(z[is_hard], labels=labels[is_hard]))[0]


@pytest.mark.parametrize("num_survivors", [0, 1, 2])
def test_exit_that_fewer_than_two_samples_reach_stays_as_it_is(num_survivors):
    logits = exits(gap(1, 2, 3), gap(1, 2, 3), labels=[0, 0, 0])
    survive = np.arange(3) < num_survivors
    found = fit_temperatures(logits, reached_KN=np.stack([np.full(3, True), survive]))
    assert found == (0.05, 0.05 if num_survivors == 2 else 1)


def test_samples_without_weight_do_not_reach():
    # The prior has no class 1: the one sample of class 0 is too few.
    logits = exits(gap(1, 2, 3), labels=[0, 1, 1], prior=(1, 0))
    assert fit_temperatures(logits) == (1,)


def test_reached_by_hand():
    confidence = np.array([[0.9, 0.4, NAN, 0.5], [0.1, 0.6, 0.9, 0.3], [0.0, 0.0, 0.0, 0.0]])
    expected = [[True] * 4, [False, True, True, False], [False] * 4]
    assert reached(confidence, (0.5, 0.6)).tolist() == expected
    assert reached(confidence, (INF, INF)).all()
    assert reached(confidence[:1], ()).tolist() == [[True] * 4]


@pytest.mark.parametrize("thresholds", [(), (0.5, 0.5)])
def test_thresholds_for_other_exits_are_refused(thresholds):
    with pytest.raises(ShapeError, match="Expected 1 thresholds"):
        reached(np.zeros((2, 3)), thresholds)


@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (3,)])
def test_reached_of_another_shape_is_refused(shape):
    logits, all_reach = exits(gap(1, 2, 3), gap(1, 2, 3), labels=[0, 0, 0]), np.full(shape, True)
    with pytest.raises(ShapeError, match=r"shape \(2, 3\)"):
        fit_temperatures(logits, reached_KN=all_reach)
    with pytest.raises(ShapeError, match=r"shape \(2, 3\)"):
        describe_temperatures(logits, (1, 1), reached_KN=all_reach)


# describe_temperatures


def test_figures_by_hand():
    # A gap of 2 log 3 is 0.9 against 0.1; at temperature 2, 0.75 against 0.25. Three in four right.
    logits = exits(gap(*[2 * LOG_3] * 4), labels=[0, 0, 1, 0], numbers=(3,))
    (found,) = describe_temperatures(logits, (2,))
    assert (found.index, found.temperature, found.num_samples) == (3, 2, 4)
    assert found.brier_before == pytest.approx((3 * 0.02 + 1.62) / 4)
    assert found.brier_after == pytest.approx((3 * 0.125 + 1.125) / 4)
    assert found.ece_before == pytest.approx(0.15)
    assert found.ece_after == pytest.approx(0, abs=1e-6)
    assert found.auroc == 0.5


def test_fitted_temperature_makes_an_overconfident_exit_honest():
    z, labels = planted(3.0)
    logits = exits(z, labels=labels)
    (found,) = describe_temperatures(logits, fit_temperatures(logits))
    assert found.ece_before > 0.2
    assert found.ece_after < 0.02
    assert found.brier_after < found.brier_before
    assert found.auroc > 0.55


def test_temperature_never_changes_what_is_predicted():
    z, labels = planted(3.0, num_samples=200)
    (found,) = describe_temperatures(exits(z, labels=labels), (5.0,))
    before, after = (
        sum(
            count * (accuracy or 0)
            for count, accuracy in zip(side.counts, side.accuracy, strict=True)
        )
        for side in (found.reliability_before, found.reliability_after)
    )
    assert before == pytest.approx(float((z.argmax(-1) == labels).sum()))
    assert after == pytest.approx(before)


def test_figures_are_of_the_samples_that_reach_and_are_no_nan():
    z, labels = planted(2.0, num_samples=100)
    spoilt = z.clone()
    spoilt[:10, 1] = NAN
    is_reached = np.arange(100) < 60
    (found,) = describe_temperatures(
        exits(spoilt, labels=labels), (2.0,), reached_KN=is_reached[None]
    )
    (expected,) = describe_temperatures(exits(z[10:60], labels=labels[10:60]), (2.0,))
    assert found == expected
    assert found.num_samples == 50


def test_exit_without_samples_has_no_figures():
    logits = exits(torch.full((3, 2), NAN), labels=[0, 1, 0])
    (found,) = describe_temperatures(logits, (1.0,))
    assert (found.num_samples, found.ece_before, found.ece_after) == (0, None, None)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["reliability_after"] is None
    assert content["auroc"] is None


def test_figures_are_json():
    (found,) = describe_temperatures(exits(gap(1, 2), labels=[0, 0]), (1.0,))
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["auroc"] is None  # right about both
    assert content["ece_before"] == content["reliability_before"]["ece"] == found.ece_before
    assert set(content) == {
        "index", "temperature", "num_samples", "auroc", "brier_before", "brier_after",
        "ece_before", "ece_after", "reliability_before", "reliability_after",
    }  # fmt: skip


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 0.0), (1.0, NAN), (1.0, INF), (1, 1, 1)])
def test_temperatures_that_are_none_are_refused(temperatures):
    logits = exits(gap(1, 2), gap(1, 2), labels=[0, 0])
    with pytest.raises(InvalidArgumentError, match="2 positive numbers, one per exit"):
        describe_temperatures(logits, temperatures)
