import math

import pytest
import torch
from torch import nn

from offramp.calibration.sweep import ChosenThreshold
from offramp.calibration.thresholds import Calibration
from offramp.errors import InvalidArgumentError, NotCalibratedError, ShapeError
from offramp.families import make_runner
from offramp.families.exits import AdaptiveRunner
from offramp.families.halting import HaltingRunner
from offramp.families.skip import SkipRunner
from offramp.measure.cost import counting_macs
from offramp.model.multi_exit import MultiExitNetwork
from offramp.policy.policies import (
    PatiencePolicy,
    Policy,
    ThresholdPolicy,
    always_leave_at,
    never_leave,
)
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy

INF, NAN = math.inf, math.nan


class Sure(nn.Module):
    """A head whose logits are the input's columns of this exit: sample and exit decide."""

    def __init__(self, exit_index: int) -> None:
        super().__init__()
        self.columns = slice(2 * exit_index, 2 * exit_index + 2)

    def forward(self, x):
        return x[:, self.columns]


@pytest.fixture
def scripted() -> MultiExitNetwork:
    """Three exits whose logits the input spells out: columns 0-1, 2-3, 4-5."""
    return MultiExitNetwork([nn.Identity()] * 3, [Sure(k) for k in range(3)])


def spell(*rows: tuple[float, float, float]) -> torch.Tensor:
    """Odds of class 0 against class 1 at each of three exits."""
    return torch.tensor([[value for odds in row for value in (odds, 0.0)] for row in rows])


@pytest.fixture
def calls(network):
    """Count the rows that each stage and head is given."""
    counted = {}

    def count(name):
        def hook(module, inputs):
            counted[name] = counted.get(name, 0) + len(inputs[0])

        return hook

    for k in range(network.num_exits):
        network.stages[k].register_forward_pre_hook(count(f"stage {k}"))
        network.exits[k].register_forward_pre_hook(count(f"exit {k}"))
    return counted


POLICY = ThresholdPolicy((0.9, 0.8), rule="max_probability")
ODDS = math.log(19)  # probability 0.95


def test_samples_leave_at_the_first_exit_that_is_sure_in_the_order_of_the_batch(scripted):
    x = spell((0, 0, 1), (-ODDS, 0, 0), (0, ODDS, 0), (1, 1, -2), (ODDS, 0, 0))
    result = AdaptiveRunner(scripted, POLICY).run(x)
    assert result.exit_index.tolist() == [2, 0, 1, 2, 0]
    assert result.output[:, 0].tolist() == pytest.approx([1, -ODDS, ODDS, -2, ODDS])
    sigmoid = [1 / (1 + math.exp(-odds)) for odds in (1, ODDS, ODDS, 2, ODDS)]
    assert result.confidence.tolist() == pytest.approx(sigmoid)
    assert result.exit_index.dtype == result.macs.dtype == torch.int64


@pytest.mark.parametrize("row", [(ODDS, 0, 0), (0, ODDS, 0), (0, 0, 0)])
def test_single_sample_is_answered_as_in_a_batch(scripted, row):
    runner = AdaptiveRunner(scripted, POLICY)
    single, batch = runner.run(spell(row)), runner.run(spell(row, (0, 0, 0)))
    for field in ("output", "exit_index", "confidence", "macs"):
        alone, together = getattr(single, field), getattr(batch, field)
        assert torch.equal(alone, together[:1])
        assert alone.dtype == together.dtype


@pytest.mark.parametrize("count", [1, 3])
def test_nan_goes_on_to_the_final_exit(scripted, count):
    x = spell(*[(NAN, NAN, NAN)] * count)
    result = AdaptiveRunner(scripted, always_leave_at(0, num_exits=3)).run(x)
    assert result.exit_index.tolist() == [2] * count
    assert result.confidence.isnan().all()


@pytest.mark.parametrize("policy", [POLICY, never_leave(3), PatiencePolicy(2, 3)])
def test_empty_batch_is_answered_by_an_empty_result(network, policy):
    result = AdaptiveRunner(network, policy).run(torch.empty(0, 6))
    assert result.output.shape == (0, 4)
    for field in (result.exit_index, result.confidence, result.macs):
        assert field.shape == (0,)
    assert result.exit_index.dtype == result.macs.dtype == torch.int64


def test_patience_remembers_the_right_samples_after_compaction(scripted):
    x = spell((1, 1, 1), (1, -1, -1), (-1, -1, 1), (-1, 1, -1))
    result = AdaptiveRunner(scripted, PatiencePolicy(2, 3)).run(x)
    assert result.exit_index.tolist() == [1, 2, 1, 2]


class LeaveBySum(Policy):
    """Leaves when a running sum in its state, one row a sample, passes a limit."""

    num_exits = 3

    def decide(self, exit_index, output, state, setting):
        (total,) = state or (torch.zeros(len(output)),)
        total = total + output[:, 0]
        return (total > 5) | (exit_index == 2), total, (total,)


def test_state_of_any_policy_goes_with_its_samples(scripted):
    x = spell((1, 2, 3), (6, 0, 0), (1, 5, 0), (0, 0, 9), (3, 3, 0))
    result = AdaptiveRunner(scripted, LeaveBySum()).run(x)
    assert result.exit_index.tolist() == [2, 0, 1, 2, 1]
    assert result.confidence.tolist() == [6, 6, 6, 9, 6]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_exits_that_are_off_are_not_run_nor_stages_after_leaving(network, calls, batch_size):
    runner = AdaptiveRunner(network, always_leave_at(1, num_exits=3))
    x = torch.randn(batch_size, 6)
    runner.run(x)  # counts the costs, which runs every part once
    calls.clear()
    result = runner.run(x)
    assert calls == {"stage 0": batch_size, "stage 1": batch_size, "exit 1": batch_size}
    assert result.macs.tolist() == [30 + 40 + 32] * batch_size


def test_only_survivors_are_run(scripted):
    rows = []
    scripted.stages[1] = nn.Identity()
    scripted.stages[1].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    runner = AdaptiveRunner(scripted, POLICY)
    runner.run(spell((0, 0, 0), (0, 0, 0)))
    rows.clear()
    runner.run(spell((ODDS, 0, 0), (0, 0, 0), (ODDS, 0, 0)))
    assert rows == [1]


def test_macs_count_the_heads_that_ran(network):
    x = torch.randn(2, 6)
    all_asked = ThresholdPolicy((1.0, 1.0))
    assert AdaptiveRunner(network, all_asked).run(x).macs.tolist() == [206, 206]
    assert AdaptiveRunner(network, never_leave(3)).run(x).macs.tolist() == [154, 154]
    assert network.costs(x).plain_macs == 154


def test_macs_follow_the_shape_of_the_input():
    network = MultiExitNetwork(
        [nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1)],
        [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)) for _ in range(2)],
    )
    runner = AdaptiveRunner(network, always_leave_at(0, num_exits=2))
    assert runner.run(torch.randn(1, 1, 5, 5)).macs.tolist() == [9 * 9 * 2 + 6]
    assert runner.run(torch.randn(2, 1, 8, 8)).macs.tolist() == [36 * 9 * 2 + 6] * 2


def test_costs_are_counted_once_for_a_shape(network, calls):
    runner = AdaptiveRunner(network, never_leave(3))
    runner.run(torch.randn(2, 6))
    calls.clear()
    runner.run(torch.randn(5, 6))
    assert calls == {"stage 0": 5, "stage 1": 5, "stage 2": 5, "exit 2": 5}


def test_several_inputs_and_features_are_compacted_together():
    class Add(nn.Module):
        def forward(self, a, b):
            return a + b, b

    class First(nn.Module):
        def forward(self, a, b):
            return torch.cat([a, torch.zeros_like(a)], 1)

    network = MultiExitNetwork([Add(), Add()], [First(), First()])
    runner = AdaptiveRunner(network, ThresholdPolicy((0.9,), rule="max_probability"))
    a, b = torch.tensor([[0.0], [9.0], [1.0]]), torch.tensor([[0.5], [0.0], [-0.5]])
    result = runner.run(a, b)
    assert result.exit_index.tolist() == [1, 0, 1]
    assert result.output[:, 0].tolist() == [1.0, 9.0, 0.0]


def test_running_needs_no_gradient_and_evaluates(network):
    network.train()
    runner = AdaptiveRunner(network, never_leave(3))
    assert not network.training
    assert not runner.run(torch.randn(2, 6)).output.requires_grad


def test_counting_costs_does_not_disturb_counting_from_outside(network):
    runner = AdaptiveRunner(network, never_leave(3))
    runner.run(torch.randn(1, 6))
    with counting_macs() as counted:
        runner.run(torch.randn(3, 6))
    assert counted() == 3 * 154


def test_runner_without_a_policy_says_how_to_get_one(network):
    with pytest.raises(NotCalibratedError, match="offramp calibrate"):
        AdaptiveRunner(network, None)


@pytest.mark.parametrize("policy", [never_leave(2), PatiencePolicy(2, 4)])
def test_policy_for_another_number_of_exits(network, policy):
    with pytest.raises(NotCalibratedError, match=f"3 exits. Got one for {policy.num_exits}"):
        AdaptiveRunner(network, policy)


# A runner for each family


def test_each_family_gets_its_runner(network, skip_network, halting_network):
    early = make_runner(network, never_leave(3))
    assert isinstance(early, AdaptiveRunner)
    assert early.policy == never_leave(3)
    skipping = make_runner(skip_network, GatePolicy(0.25))
    assert isinstance(skipping, SkipRunner)
    assert skipping.policy == GatePolicy(0.25)
    dropping = make_runner(halting_network, HaltingPolicy(0.5))
    assert isinstance(dropping, HaltingRunner)
    assert dropping.policy == HaltingPolicy(0.5)


def test_policies_of_another_family_are_refused(network, skip_network, halting_network):
    one_exit = MultiExitNetwork([nn.Identity()], [nn.Identity()])
    with pytest.raises(NotCalibratedError, match=r"for a MultiExitNetwork\. Got a GatePolicy"):
        make_runner(one_exit, GatePolicy())
    with pytest.raises(NotCalibratedError, match=r"for a SkipNetwork\. Got a ThresholdPolicy"):
        make_runner(skip_network, never_leave(1))
    with pytest.raises(NotCalibratedError, match=r"for a HaltingNetwork\. Got a GatePolicy"):
        make_runner(halting_network, GatePolicy())
    with pytest.raises(NotCalibratedError, match=r"for a SkipNetwork\. Got a HaltingPolicy"):
        make_runner(skip_network, HaltingPolicy())
    with pytest.raises(NotCalibratedError, match="offramp calibrate"):
        make_runner(network, None)


def test_a_calibration_stands_for_its_policy(network):
    chosen = Calibration(policy=ThresholdPolicy((0.3, 0.4)), accuracy=0.9, mean_macs=50.0)
    x = torch.randn(5, 6)
    expected = AdaptiveRunner(network, chosen.policy).run(x)
    for runner in (AdaptiveRunner(network, chosen), make_runner(network, chosen)):
        assert runner.policy is chosen.policy
        assert torch.equal(runner.run(x).exit_index, expected.exit_index)


def test_a_chosen_threshold_stands_for_its_policy(skip_network, halting_network):
    for network, kind, policy in (
        (skip_network, SkipRunner, GatePolicy(0.7)),
        (halting_network, HaltingRunner, HaltingPolicy(0.7)),
    ):
        chosen = ChosenThreshold(policy=policy, accuracy=0.9, mean_macs=50.0)
        for runner in (kind(network, chosen), make_runner(network, chosen)):
            assert isinstance(runner, kind)
            assert runner.policy.threshold == 0.7


def test_other_networks_and_policies_are_refused_in_one_line(network, skip_network):
    chosen = ChosenThreshold(policy=GatePolicy(0.7), accuracy=0.9, mean_macs=50.0)
    policy = ThresholdPolicy((0.3, 0.4))
    for make, says in (
        (lambda: AdaptiveRunner(nn.Linear(6, 4), policy), "as add_exits makes.*Got a Linear"),
        (lambda: AdaptiveRunner(network, 0.5), "a policy for exits.*Got a float"),
        (lambda: AdaptiveRunner(network, chosen), "Got a GatePolicy"),
        (lambda: SkipRunner(network), "as add_gates makes. Got a MultiExitNetwork"),
        (lambda: SkipRunner(skip_network, policy), "Expected a GatePolicy.*Got a ThresholdPolicy"),
        (lambda: HaltingRunner(skip_network), "as add_halting makes. Got a SkipNetwork"),
    ):
        with pytest.raises(InvalidArgumentError, match=says) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_inputs_come_as_a_tensor_a_tuple_a_list_or_a_dict(network):
    runner, x = AdaptiveRunner(network, never_leave(3)), torch.randn(5, 6)
    expected = runner.run(x).output
    for given in ((x,), [x], {"pixel_values": x, "labels": 0}, x.numpy(), x.double()):
        assert torch.equal(runner.run(given).output, expected)
    with pytest.raises(ShapeError, match=r"does not take inputs \(5, 7\) of float32"):
        runner.run(torch.zeros(5, 7))
    with pytest.raises(InvalidArgumentError, match="turn it into token ids"):
        runner.run("a film")


def test_what_runners_say_are_ordinary_tensors(network, skip_network, halting_network):
    runs = [
        AdaptiveRunner(network, ThresholdPolicy((0.3, 0.3))).run(torch.randn(rows, 6))
        for rows in (1, 5)
    ]
    runs.append(SkipRunner(skip_network).run(torch.randn(2, 3, 16, 16)))
    runs.append(HaltingRunner(halting_network).run(torch.randn(2, 3, 12, 12)))
    for said in runs:
        head = nn.Linear(said.output.shape[1], 1)
        (head(said.output)[:, 0] * said.confidence).sum().backward()
        assert head.weight.grad.isfinite().all()
        assert int((said.macs.add_(1) - said.macs).sum()) == 0


class Remembers(nn.Module):
    """Keeps a tensor that its first pass makes, as caches of positions do."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(6, 4), None

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.ones(4)
        return self.linear(x) * self.scale


def test_a_network_that_was_run_first_can_be_trained():
    network = MultiExitNetwork([Remembers(), nn.Identity()], [nn.Linear(4, 2), nn.Linear(4, 2)])
    x = torch.randn(3, 6)
    AdaptiveRunner(network, never_leave(2)).run(x)
    sum(logits.sum() for logits in network.train()(x)).backward()
    assert network.stages[0].linear.weight.grad.abs().sum() > 0
