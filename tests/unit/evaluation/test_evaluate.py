import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from offramp.calibration.asked import Asked
from offramp.calibration.collect import ExitLogits, collect
from offramp.calibration.evidence import calibrate
from offramp.calibration.guarantee import calibrate_with_guarantee
from offramp.errors import DataError, InvalidArgumentError, NotCalibratedError, ShapeError
from offramp.evaluation.evaluate import (
    BlocksEvaluation,
    ExitEvaluation,
    Rival,
    TokensEvaluation,
    evaluate,
)
from offramp.families.exits import AdaptiveRunner
from offramp.measure.exit_costs import ExitCosts
from offramp.measure.intervals import difference_interval
from offramp.policy.policies import ThresholdPolicy, always_leave_at
from offramp.results import AdaptiveResult

COSTS = ExitCosts(stage_macs=(10, 20), head_macs=(1, 2))
LABELS = torch.tensor([0, 0, 1, 1, 0])


class Scripted:
    """A runner that answers what it was told, in turn."""

    def __init__(self, predictions, exits, macs):
        self.rows = list(zip(predictions, exits, macs, strict=True))

    def run(self, batch):
        rows, self.rows = self.rows[: len(batch)], self.rows[len(batch) :]
        predictions, exits, macs = map(torch.tensor, zip(*rows, strict=True))
        return AdaptiveResult(
            output=torch.nn.functional.one_hot(predictions, 2),
            exit_index=exits,
            confidence=torch.ones(len(rows)),
            macs=macs,
        )


def logits_that_predict(*rows):
    logits = torch.nn.functional.one_hot(torch.tensor(rows), 2).float()
    return ExitLogits(logits_KNC=logits, labels_N=LABELS, costs=COSTS)


def loader():
    return [(torch.zeros(3, 1), LABELS[:3]), (torch.zeros(2, 1), LABELS[3:])]


LOGITS = logits_that_predict([0, 1, 1, 0, 1], [0, 0, 1, 0, 0])  # 2 and 4 of 5 right
RUNNER_SAYS = ([0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [11, 11, 33, 33, 33])  # 4 of 5 right


def test_figures_by_hand():
    found = evaluate(Scripted(*RUNNER_SAYS), loader(), LOGITS, plain_accuracy=0.9)
    assert found.num_samples == 5
    assert found.accuracy == pytest.approx(0.8)
    assert found.mean_macs == pytest.approx((2 * 11 + 3 * 33) / 5)
    assert found.plain_macs == 32
    assert found.final_exit_accuracy == pytest.approx(0.8)
    assert found.plain_accuracy == 0.9
    assert found.exits == (
        ExitEvaluation(index=0, accuracy=pytest.approx(0.4), share=pytest.approx(0.4), macs=11),
        ExitEvaluation(index=1, accuracy=pytest.approx(0.8), share=pytest.approx(0.6), macs=33),
    )


def test_shares_are_computed_in_double_precision():
    found = evaluate(Scripted(*RUNNER_SAYS), loader(), LOGITS)
    assert [row.share for row in found.exits] == [0.4, 0.6]


def test_exit_that_nobody_left_by_has_share_zero():
    stay = ([0] * 5, [0] * 5, [11] * 5)
    found = evaluate(Scripted(*stay), loader(), LOGITS)
    assert [row.share for row in found.exits] == [1, 0]


def test_macs_of_an_exit_are_those_of_its_leavers():
    found = evaluate(Scripted(*RUNNER_SAYS), loader(), LOGITS)
    _, exits, macs = RUNNER_SAYS
    expected = [macs[exits.index(k)] for k in (0, 1)]
    assert [row.macs for row in found.exits] == expected


def test_rows_are_those_of_the_exits_that_the_logits_are_of():
    later = replace(LOGITS, numbers=(1, 3))
    exits = [1 + 2 * k for k in RUNNER_SAYS[1]]
    found = evaluate(Scripted(RUNNER_SAYS[0], exits, RUNNER_SAYS[2]), loader(), later)
    assert [(row.index, row.share, row.macs) for row in found.exits] == [(1, 0.4, 11), (3, 0.6, 33)]
    assert [row.accuracy for row in found.exits] == pytest.approx([0.4, 0.8])


def test_dictionary_can_be_held_by_json():
    content = evaluate(Scripted(*RUNNER_SAYS), loader(), LOGITS).to_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["plain_accuracy"] is None


class Skipping:
    """Runs both blocks of the first sample of a batch, and the first block of the others."""

    def run(self, batch):
        blocks = torch.tensor([[True, True]] + [[True, False]] * (len(batch) - 1))
        return AdaptiveResult(
            output=torch.nn.functional.one_hot(torch.zeros(len(batch), dtype=torch.int64), 2),
            exit_index=torch.zeros(len(batch), dtype=torch.int64),
            confidence=torch.ones(len(batch)),
            macs=10 + 10 * blocks.sum(1),
            blocks=blocks.numpy(),  # as a bundle has it
        )


def test_blocks_by_hand():
    logits = torch.nn.functional.one_hot(LABELS, 2).float()[None]
    costs = ExitCosts(stage_macs=(24,), head_macs=(1,))
    found = evaluate(
        Skipping(), loader(), ExitLogits(logits_KNC=logits, labels_N=LABELS, costs=costs)
    )
    # Two of five samples run both blocks, in batches of 3 and 2: they cost 30, the others 20.
    assert found.blocks == BlocksEvaluation(
        run_rates=(1.0, 0.4), saved=pytest.approx(0.3), macs_saved=pytest.approx(1 - 24 / 25)
    )
    assert (found.mean_macs, found.plain_macs) == (24, 25)
    assert (found.accuracy, found.final_exit_accuracy) == (0.6, 1.0)
    assert [(row.index, row.share, row.macs) for row in found.exits] == [(0, 1.0, 24)]
    content = json.loads(json.dumps(found.to_dict()))
    assert content == found.to_dict()
    assert content["blocks"]["run_rates"] == [1.0, 0.4]


class Dropping:
    """Three layers: the first sample of a batch keeps its four tokens, the others lose them."""

    def run(self, batch):
        tokens = torch.tensor([[4, 4, 4]] + [[4, 2, 0]] * (len(batch) - 1))
        return AdaptiveResult(
            output=torch.nn.functional.one_hot(torch.zeros(len(batch), dtype=torch.int64), 2),
            exit_index=torch.zeros(len(batch), dtype=torch.int64),
            confidence=torch.ones(len(batch)),
            macs=tokens.sum(1),
            tokens=tokens.numpy(),  # as a bundle has it
        )


def test_tokens_by_hand():
    logits = torch.nn.functional.one_hot(LABELS, 2).float()[None]
    costs = ExitCosts(stage_macs=(12,), head_macs=(0,))
    found = evaluate(
        Dropping(), loader(), ExitLogits(logits_KNC=logits, labels_N=LABELS, costs=costs)
    )
    # Two of five samples, in batches of 3 and 2, keep all: 12 each; the others run 4 and 2.
    assert found.tokens == TokensEvaluation(
        per_layer=pytest.approx((4.0, 2.8, 1.6)),
        mean_depth=pytest.approx((2 * 12 + 3 * 6) / 20),
        macs_saved=pytest.approx(1 - 8.4 / 12),
    )
    assert found.blocks is None
    content = json.loads(json.dumps(found.to_dict()))
    assert content == found.to_dict()
    assert content["tokens"]["per_layer"] == pytest.approx([4.0, 2.8, 1.6])
    assert "blocks" not in content


def test_networks_that_skip_nothing_say_nothing_of_blocks_or_tokens():
    found = evaluate(Scripted(*RUNNER_SAYS), loader(), LOGITS)
    assert (found.blocks, found.tokens) == (None, None)
    assert not {"blocks", "tokens"} & found.to_dict().keys()


@pytest.mark.parametrize("exit_index", [0, 1, 2])
def test_always_leaving_at_an_exit_reaches_its_accuracy_and_cost(network, exit_index):
    batches = [(torch.randn(50, 6), torch.randint(0, 4, (50,))) for _ in range(2)]
    policy = always_leave_at(exit_index, num_exits=3)
    found = evaluate(AdaptiveRunner(network, policy), batches, collect(network, batches))
    assert found.accuracy == found.exits[exit_index].accuracy
    assert found.exits[exit_index].share == 1
    assert found.mean_macs == (50, 102, 154)[exit_index]
    every_head = [50, 122, 206]
    every_head[exit_index] = (50, 102, 154)[exit_index]  # the heads before it are off
    assert [row.macs for row in found.exits] == every_head


@pytest.mark.parametrize(
    "batches", [loader()[:1], [(torch.zeros(5, 1), 1 - LABELS)], [*loader(), *loader()]]
)
def test_other_samples_than_those_of_the_logits_are_refused(constant_network, batches):
    network = constant_network([[0.0, 1.0], [1.0, 0.0]])
    network.stages[0] = torch.nn.Linear(1, 2)
    runner = AdaptiveRunner(network, ThresholdPolicy((0.5,)))
    with pytest.raises(ShapeError, match="same order"):
        evaluate(runner, batches, LOGITS)


def test_empty_loader_is_refused(network):
    with pytest.raises(DataError, match="at least one sample"):
        evaluate(Scripted([], [], []), [], LOGITS)


# One pass, and what was asked


@pytest.fixture
def pairs():
    return torch.randn(120, 6), torch.randint(0, 4, (120,))


@pytest.fixture
def shuffled(pairs):
    return DataLoader(TensorDataset(*pairs), batch_size=50, shuffle=True)


def in_order(pairs):
    return DataLoader(TensorDataset(*pairs), batch_size=50)


def test_network_and_policy_need_no_second_pass(network, pairs, shuffled):
    policy = ThresholdPolicy((0.02, 0.02))
    runner = AdaptiveRunner(network, policy)
    expected = evaluate(runner, in_order(pairs), collect(network, in_order(pairs)))
    assert 0 < expected.exits[0].share < 1
    for found in (evaluate(network, policy, shuffled), evaluate(runner, shuffled)):
        assert (found.exits, found.drop, found.mean_macs) == (
            expected.exits,
            expected.drop,
            expected.mean_macs,
        )


def test_a_generator_is_gone_through_once(network, pairs):
    found = evaluate(network, ThresholdPolicy((0.02, 0.02)), iter([pairs]))
    assert found.num_samples == 120


def test_a_calibration_brings_what_was_asked(network, pairs):
    chosen = calibrate(collect(network, in_order(pairs)), max_drop=0.05)
    found = evaluate(network, chosen, in_order(pairs))
    assert found.accuracy == chosen.accuracy  # on the samples that chose it
    assert (found.asked.target, found.asked.limit, found.asked.num_samples) == (
        "max_drop",
        0.05,
        120,
    )
    assert found.got == found.drop
    assert found.got.value == pytest.approx(found.final_exit_accuracy - found.accuracy)
    words = " ".join(str(found).split())
    assert "a drop of at most 5 points of accuracy from the final exit, on 120 calib" in words
    assert "score), on 120 samples" in words


def test_network_without_data_is_refused(network, pairs):
    with pytest.raises(InvalidArgumentError, match=r"evaluate\(network, policy, data\)"):
        evaluate(network, in_order(pairs))


def test_network_without_a_policy_is_refused(network, pairs):
    with pytest.raises(NotCalibratedError):
        evaluate(network, None, in_order(pairs))


def test_drop_is_paired_sample_by_sample():
    # The final exit is wrong about sample 3 alone, the runner about sample 1 alone.
    found = evaluate(Scripted(*RUNNER_SAYS), loader(), LOGITS)
    assert found.drop == difference_interval(1, 1, 5)
    assert f"drop                      0 points (95 % interval {100 * found.drop.low:.2f}" in str(
        found
    )


def asked(target, limit, **more):
    return Asked(target=target, limit=limit, num_samples=400, **more)


@pytest.mark.parametrize(
    ("wanted", "value", "method"),
    [
        (asked("max_drop", 0.01), 0.0, "score"),
        (asked("max_risk", 0.1, risk="disagreement"), 2 / 5, "exact"),
        (asked("max_risk", 0.1, risk="error"), 1 / 5, "exact"),
        (asked("max_risk", 0.1, risk="accuracy_gap"), 0.0, "score"),
        (asked("max_risk", 0.1, risk="brier_gap"), 0.0, "bootstrap"),
        (asked("budget_share", 0.5), (2 * 11 + 3 * 33) / 5 / 32, "bootstrap"),
        (asked("budget_macs", 20), (2 * 11 + 3 * 33) / 5 / 32, "bootstrap"),
    ],
)
def test_what_came_of_what_was_asked(wanted, value, method):
    found = evaluate(Scripted(*RUNNER_SAYS), loader(), LOGITS, asked=wanted)
    assert found.got.value == pytest.approx(value)
    assert found.got.method == method
    assert found.got.low <= found.got.value <= found.got.high
    assert json.loads(json.dumps(found.to_dict()))["asked"]["target"] == wanted.target
    assert "got  " in str(found)


def test_milliseconds_are_asked_for_and_not_measured_here():
    found = evaluate(Scripted(*RUNNER_SAYS), loader(), LOGITS, asked=asked("budget_ms", 2))
    assert found.got is None
    assert "at most 2 ms a sample on average" in str(found)


def test_rival_stands_under_its_own_name_with_its_own_macs():
    found = evaluate(Scripted(*RUNNER_SAYS), loader(), LOGITS, plain_accuracy=0.9)
    named = str(replace(found, rival=Rival(name="small", macs=16)))
    assert "small                     90.00 % at its own 16 MACs, 50.00 % of the plain" in named
    assert "plain network             32 MACs (the same backbone, its last exit only)" in named
    assert "plain, trained as long    90.00 %" in str(found)
    assert "None" not in named + repr(found)


def test_frame_has_a_row_for_each_exit(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    rows = evaluate(Scripted(*RUNNER_SAYS), loader(), LOGITS).to_frame()
    assert [row["macs"] for row in rows] == [11, 33]
    assert all("mean_iou" not in row for row in rows)


def test_a_guarantee_is_said_as_it_was_asked(network, pairs):
    logits = collect(network, in_order(pairs))
    chosen = calibrate_with_guarantee(logits, max_risk=0.6, guarantee=0.9)
    found = evaluate(network, chosen, in_order(pairs))
    assert (found.asked.target, found.asked.limit) == ("max_risk", 0.6)
    assert (found.asked.guarantee, found.asked.num_samples) == (0.9, 120)
    assert found.got == found.drop
    assert "With probability at least 90 %" in " ".join(str(chosen).split())


def test_a_runner_of_ones_own_needs_the_logits():
    with pytest.raises(InvalidArgumentError, match=r"evaluate\(runner, data, logits\)"):
        evaluate(Scripted(*RUNNER_SAYS), loader())
