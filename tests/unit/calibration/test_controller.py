from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from offramp.calibration.collect import ExitLogits
from offramp.calibration.controller import fit_controller
from offramp.calibration.evidence import calibrate
from offramp.calibration.guarantee import calibrate_with_guarantee
from offramp.errors import InvalidArgumentError
from offramp.measure.exit_costs import ExitCosts
from offramp.policy.controller import ControllerPolicy

# Values worked out by hand have few samples.
pytestmark = pytest.mark.filterwarnings("ignore::offramp.errors.FewSamplesWarning")

COSTS = ExitCosts(stage_macs=(40_000_000, 20_000_000, 40_000_000), head_macs=(0, 0, 0))
"""So many that what a scorer takes does not show."""


def mean_percent(logits: ExitLogits, policy: ControllerPolicy) -> float:
    """Mean MACs, in percent of the plain network's."""
    return 100 * logits.measure(policy).mean_macs / COSTS.plain_macs


def said(predicted_KN, labels_N, *, seed, num_classes, prior=None) -> ExitLogits:
    """Exits that predict what is given, as sure of a wrong answer as of a right one."""
    generator = torch.Generator().manual_seed(seed)
    predicted_KN = torch.as_tensor(predicted_KN)
    sureness = 1 + 3 * torch.rand(*predicted_KN.shape, 1, generator=generator)
    sureness[-1] = 8.0
    logits = sureness * F.one_hot(predicted_KN, num_classes)
    return ExitLogits(
        logits_KNC=logits, labels_N=torch.as_tensor(labels_N), costs=COSTS, prior=prior
    )


def class_tells(seed: int, num_samples: int = 3000) -> ExitLogits:
    """Exit 0 is always right where it says 0 or 1, and guesses between 2 and 3."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=num_samples)
    first = np.where(labels < 2, labels, rng.integers(2, 4, size=num_samples))
    return said(np.stack([first, first, labels]), labels, seed=seed, num_classes=4)


def agreement_tells(seed: int, num_samples: int = 3000) -> ExitLogits:
    """Exits 0 and 1 are each wrong about a third, of ten classes, not of the same."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=num_samples)
    guesses = rng.integers(10, size=(2, num_samples))
    early = np.where(rng.random((2, num_samples)) < 0.65, labels, guesses)
    return said(np.concatenate([early, labels[None]]), labels, seed=seed, num_classes=10)


@pytest.mark.parametrize(
    ("draw", "budget_share", "gain"), [(class_tells, 0.7, 0.1), (agreement_tells, 0.82, 0.07)]
)
def test_controller_knows_what_no_confidence_tells(draw, budget_share, gain):
    held_out, new = draw(0), draw(1)
    by_entropy = calibrate(held_out, budget_share=budget_share)
    by_controller = calibrate(held_out, budget_share=budget_share, rule=fit_controller)
    expected = new.measure(by_entropy.policy)
    found = new.measure(by_controller.policy)
    assert found.accuracy > expected.accuracy + gain
    assert found.accuracy > 0.97
    assert found.mean_macs < 1.03 * budget_share * COSTS.plain_macs


def test_thresholds_of_its_own_leave_where_it_pays():
    held_out, new = class_tells(0), class_tells(1)
    found = new.measure(fit_controller(held_out, price=0.1))
    assert found.accuracy > 0.99
    assert found.mean_macs == pytest.approx(70e6, abs=8e6)  # half leave at 40, half stay to 100
    dear = fit_controller(held_out, price=3.0)
    assert mean_percent(new, dear) == pytest.approx(40, abs=1)


def test_exits_can_be_switched_off_afterwards():
    held_out, new = class_tells(0), class_tells(1)
    policy = fit_controller(held_out)
    found = calibrate(held_out, budget_share=0.8, rule=policy, off=frozenset({0}))
    assert found.policy.off_exits == {0}
    assert new.measure(found.policy).accuracy > 0.99  # half leave at 60, half at 100


def test_same_seed_same_policy():
    logits = class_tells(0, 500)
    assert fit_controller(logits, seed=4) == fit_controller(logits, seed=4)
    assert fit_controller(logits, seed=4) != fit_controller(logits, seed=5)


def test_random_numbers_of_others_are_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    fit_controller(class_tells(0, 100))
    assert torch.equal(torch.rand(1), expected)


def test_weights_count():
    """Where only classes 2 and 3 are met, leaving at once is right half of the time for all."""
    logits = class_tells(0)
    population = replace(logits, prior=(0.0, 0.0, 0.5, 0.5))
    assert mean_percent(population, fit_controller(population, price=0.4)) > 99
    assert mean_percent(population, fit_controller(population, price=1.2)) < 41
    # Nobody pays for samples that the population does not hold.
    spoilt = logits.labels_N.where(logits.labels_N >= 2, 1 - logits.labels_N)
    assert fit_controller(replace(population, labels_N=spoilt)) == fit_controller(population)


def test_nan_teaches_nothing_and_goes_to_the_end():
    logits = class_tells(0)
    logits.logits_KNC[0, ::2] = torch.nan
    logits.logits_KNC[1] = torch.nan
    policy = fit_controller(logits)
    found = logits.measure(policy)
    assert found.accuracy > 0.99
    assert found.mean_macs == pytest.approx(85e6, abs=5e6)  # a quarter leaves at 40


def test_guarantee_fits_on_the_samples_that_do_not_test():
    given = []

    def rule(logits):
        given.append(len(logits.labels_N))
        return fit_controller(logits)

    found = calibrate_with_guarantee(class_tells(0), max_risk=0.02, rule=rule)
    assert given == [3000 - found.guarantee.num_tested]
    assert mean_percent(class_tells(1), found.policy) < 85


def test_a_network_of_one_exit_needs_no_scorer():
    logits = ExitLogits(
        logits_KNC=torch.randn(1, 20, 3),
        labels_N=torch.randint(3, (20,)),
        costs=ExitCosts(stage_macs=(1,), head_macs=(1,)),
    )
    assert fit_controller(logits) == ControllerPolicy((), ())


@pytest.mark.parametrize("price", [0.0, -1.0, float("inf"), float("nan")])
def test_price_out_of_range_is_refused(price):
    with pytest.raises(InvalidArgumentError, match="'price' parameter must be a positive number"):
        fit_controller(class_tells(0, 10), price=price)
