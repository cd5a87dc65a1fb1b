import json
import math

import pytest
import torch

from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.policy.as_dict import policy_from_dict, policy_to_dict
from offramp.policy.confidence import confidence_from_entropy_nats
from offramp.policy.policies import (
    PatiencePolicy,
    Policy,
    Setting,
    ThresholdPolicy,
    always_leave_at,
    never_leave,
)
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy

INF, NAN = math.inf, math.nan


def logits_for(*labels: int) -> torch.Tensor:
    """Logits of four classes that predict the given labels."""
    return 3.0 * torch.nn.functional.one_hot(torch.tensor(labels), 4)


def two_class_logits(*probabilities: float) -> torch.Tensor:
    """Logits whose larger class probability is the given one."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1).log()


# ThresholdPolicy


def test_threshold_decides_per_exit_and_by_at_least():
    policy = ThresholdPolicy((0.5, 0.9), rule="max_probability")
    output = two_class_logits(0.5, 0.7, 0.95)
    leave, confidence, state = policy.step(0, output, ())
    assert leave.tolist() == [True, True, True]
    torch.testing.assert_close(confidence, torch.tensor([0.5, 0.7, 0.95]))
    assert state == ()
    leave, _, _ = policy.step(1, output, ())
    assert leave.tolist() == [False, False, True]


def test_final_exit_accepts_everything_even_nan():
    policy = ThresholdPolicy((1.0,))
    leave, confidence, _ = policy.step(1, torch.tensor([[0.0, 0.0], [NAN, 0.0]]), ())
    assert leave.tolist() == [True, True]
    assert confidence.isnan().tolist() == [False, True]


@pytest.mark.parametrize("rule", ["entropy", "max_probability", "margin"])
def test_nan_never_leaves_before_the_final_exit(rule):
    output = torch.tensor([[NAN, 0.0], [0.0, 0.0]])
    leave, _, _ = ThresholdPolicy((0.0,), rule=rule).step(0, output, ())
    assert leave.tolist() == [False, True]


def test_infinite_threshold_switches_an_exit_off_and_only_that():
    policy = ThresholdPolicy((INF, 0.5))
    assert [policy.is_off(k) for k in range(policy.num_exits)] == [True, False, False]
    leave, _, _ = policy.step(0, torch.tensor([[99.0, 0.0]]), ())
    assert not leave.any()


def test_thresholds_from_entropy_are_the_flipped_and_divided_entropies():
    policy = ThresholdPolicy.from_entropy_nats([0.1, 0.5], num_classes=47)
    expected = [confidence_from_entropy_nats(t, 47) for t in (0.1, 0.5)]
    assert policy.thresholds == pytest.approx(expected)
    assert policy.rule == "entropy"


@pytest.mark.parametrize("thresholds", [0.5, "0.5", (None,), None])
def test_thresholds_are_numbers(thresholds):
    with pytest.raises(InvalidArgumentError, match="a number for each exit but the final one"):
        ThresholdPolicy(thresholds)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, NAN, -INF])
def test_thresholds_out_of_range_are_refused(threshold):
    with pytest.raises(InvalidArgumentError, match=r"in \[0, 1\], or inf"):
        ThresholdPolicy((0.5, threshold))


@pytest.mark.parametrize(
    "build",
    [lambda: ThresholdPolicy((0.5,), rule="gini"), lambda: PatiencePolicy(2, 3, rule="gini")],
)
def test_unknown_rule_is_refused_with_the_known_ones(build):
    with pytest.raises(InvalidArgumentError, match="entropy, max_probability, margin"):
        build()


# never_leave, always_leave_at


def test_never_leave_switches_off_all_but_the_final_exit():
    policy = never_leave(3)
    assert [policy.is_off(k) for k in range(3)] == [True, True, False]
    assert policy.off_exits == {0, 1}
    assert never_leave(1).num_exits == 1


@pytest.mark.parametrize("exit_index", [0, 1, 2])
def test_always_leave_at_lets_everyone_go_there_and_nobody_before(exit_index):
    policy = always_leave_at(exit_index, num_exits=3)
    output = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    assert policy.num_exits == 3
    for k in range(exit_index):
        assert policy.is_off(k)
    assert policy.step(exit_index, output, ())[0].all()


@pytest.mark.parametrize("exit_index", [-1, 3])
def test_always_leave_at_an_exit_that_is_not_there(exit_index):
    with pytest.raises(InvalidArgumentError, match=rf"int in \[0, 2\]\. Got {exit_index}"):
        always_leave_at(exit_index, num_exits=3)


# PatiencePolicy


def test_patience_leaves_when_enough_exits_in_a_row_agree():
    policy = PatiencePolicy(2, num_exits=4)
    leave, _, state = policy.step(0, logits_for(1, 1, 2), ())
    assert leave.tolist() == [False, False, False]
    leave, _, state = policy.step(1, logits_for(1, 3, 0), state)
    assert leave.tolist() == [True, False, False]
    survivors = tuple(rows[~leave] for rows in state)
    leave, _, state = policy.step(2, logits_for(3, 1), survivors)
    assert leave.tolist() == [True, False]
    survivors = tuple(rows[~leave] for rows in state)
    leave, _, _ = policy.step(3, logits_for(2), survivors)
    assert leave.tolist() == [True]


def test_patience_of_three_starts_over_when_the_label_changes():
    policy = PatiencePolicy(3, num_exits=6)
    state = ()
    left = []
    for k, label in enumerate((0, 0, 1, 1, 1)):
        leave, _, state = policy.step(k, logits_for(label), state)
        left.append(bool(leave))
    assert left == [False, False, False, False, True]


def test_patience_reports_the_confidence_of_its_rule():
    _, confidence, _ = PatiencePolicy(2, 3, rule="margin").step(0, two_class_logits(0.8), ())
    assert confidence.item() == pytest.approx(0.6)


def test_patience_never_lets_nan_leave():
    policy = PatiencePolicy(2, num_exits=3)
    nan = torch.tensor([[NAN, 0.0]])
    _, _, state = policy.step(0, nan, ())
    leave, _, _ = policy.step(1, nan, state)
    assert not leave.any()


def test_patience_does_not_count_a_nan_exit_as_agreeing():
    policy = PatiencePolicy(2, num_exits=3)
    _, _, state = policy.step(0, torch.tensor([[NAN, 0.0]]), ())
    leave, _, _ = policy.step(1, torch.tensor([[9.0, 0.0]]), state)  # the same argmax
    assert not leave.any()


@pytest.mark.parametrize("patience", [1, 0, -1])
def test_patience_below_two_is_refused(patience):
    with pytest.raises(InvalidArgumentError, match=f"at least 2. Got {patience}"):
        PatiencePolicy(patience, 3)


# Dictionaries


@pytest.mark.parametrize(
    "policy",
    [
        ThresholdPolicy((0.25, INF), rule="margin"),
        ThresholdPolicy(()),
        PatiencePolicy(3, 5, rule="entropy"),
        GatePolicy(0.25),
        HaltingPolicy(0.75),
    ],
)
def test_policy_survives_json(policy):
    text = json.dumps(policy_to_dict(policy), allow_nan=False)
    assert policy_from_dict(json.loads(text)) == policy


def test_switched_off_exit_is_null_in_json():
    assert policy_to_dict(ThresholdPolicy((0.5, INF)))["thresholds"] == [0.5, None]


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"kind": "oracle"},
        {"kind": "threshold", "rule": "entropy"},
        {"kind": "threshold", "rule": "entropy", "thresholds": 0.5},
        {"kind": "threshold", "rule": "entropy", "thresholds": ["high"]},
        {"kind": "threshold", "rule": "entropy", "thresholds": [2.0]},
        {"kind": "threshold", "rule": "gini", "thresholds": [0.5]},
        {"kind": "patience", "rule": "entropy", "patience": "two", "num_exits": 3},
        {"kind": "patience", "rule": "entropy", "patience": 2.0, "num_exits": 3},
        {"kind": "patience", "rule": "entropy", "patience": 2, "num_exits": 10**12},
        {"kind": "patience", "rule": "entropy", "patience": 2, "num_exits": -1},
        {"kind": "threshold", "thresholds": [0.5]},
        {"kind": "threshold", "rule": "entropy", "thresholds": [0.5], "colour": 1},
        {"kind": "threshold", "rule": "entropy", "thresholds": ["0.5"]},
        {"kind": "threshold", "rule": "entropy", "thresholds": [True]},
        {"kind": "threshold", "rule": "entropy", "thresholds": [0.5], "temperatures": [1, 0]},
        {"kind": "threshold", "rule": ["entropy"], "thresholds": [0.5]},
        {"kind": "gates"},
        {"kind": "gates", "threshold": None},
        {"kind": "gates", "threshold": True},
        {"kind": "gates", "threshold": 0.5, "thresholds": [0.5]},
        {"kind": "gates", "threshold": 1.5},
    ],
)
def test_damaged_policy_is_refused(content):
    with pytest.raises(ArtifactError, match="Expected a"):
        policy_from_dict(content)


def test_policy_of_an_unknown_class_cannot_be_described():
    class Whim(Policy):
        num_exits = 2

        def decide(self, exit_index, output, state, setting):
            raise NotImplementedError

    with pytest.raises(InvalidArgumentError, match="Got Whim"):
        policy_to_dict(Whim())


def test_temperature_divides_the_logits_before_the_confidence():
    logits = torch.tensor([[2.0, 0.0], [0.5, 0.0]])
    policy = ThresholdPolicy((0.7,), "max_probability", (2.0, 1.0))
    leave, confidence, _ = policy.step(0, logits, ())
    assert confidence.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-0.25))])
    assert leave.tolist() == [True, False]
    plain = ThresholdPolicy((0.7,), "max_probability")
    assert torch.equal(policy.step(1, logits, ())[1], plain.step(1, logits, ())[1])
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 0.0), (1.0, math.nan), (1.0, math.inf)])
def test_temperatures_out_of_range_are_refused(temperatures):
    with pytest.raises(InvalidArgumentError, match="2 positive numbers, one per exit"):
        ThresholdPolicy((0.7,), temperatures=temperatures)


def test_setting_given_from_outside_decides():
    logits = torch.tensor([[2.0, 0.0]])
    policy = ThresholdPolicy((0.99,), "max_probability")
    setting = Setting(torch.tensor(1.0), torch.tensor(0.5))
    assert not policy.step(0, logits, ())[0]
    assert policy.decide(0, logits, (), setting)[0]
