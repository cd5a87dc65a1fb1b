"""The contract that every family keeps, and the toy of these tests too."""

import ast
import copy
import json
from dataclasses import replace

import pytest
import torch

import offramp
from offramp.errors import InvalidArgumentError, NotCalibratedError, OfframpError
from offramp.evaluation.sweeping import collect_sweep
from offramp.evaluation.timing import time_runner
from offramp.families import (
    FAMILIES,
    check_agreement,
    family_for,
    family_of,
    make_runner,
    reference_of,
)
from offramp.families.agreement import answer_in_batches
from offramp.measure.agreement import compare
from offramp.runs.card import check_evaluation, model_card
from offramp.training.fit import make_task


def rerun(example, **changes):
    """The answers of another policy or to another size of batches."""
    return make_runner(example.network, changes.pop("policy", example.policy)).run(example.inputs)


def test_every_family_has_an_example(example):
    assert set(FAMILIES) == {"exits", "skip", "halting", "width"}
    assert example.family is FAMILIES[example.family.name]
    assert family_for(example.policy) is example.family


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_running_less_answers_what_choosing_afterwards_answers(example, batch_size):
    before = example.inputs.clone()
    found = answer_in_batches(example.runner, example.inputs, batch_size=batch_size)
    assert torch.equal(example.inputs, before)
    agreement = compare(found, reference_of(example.network, example.policy, example.inputs))
    assert (agreement.num_samples, agreement.moved_far) == (40, 0)
    assert agreement.holds
    assert max(agreement.differences) < 1e-4


def test_a_sample_does_not_depend_on_its_batch(example):
    together = example.runner.run(example.inputs)
    alone = answer_in_batches(example.runner, example.inputs, batch_size=1)
    alike = (together.work == alone.work).all(1)
    assert alike.sum() >= len(alike) - 1
    assert torch.equal(together.macs[alike], alone.macs[alike])
    torch.testing.assert_close(together.output[alike], alone.output[alike], rtol=1e-4, atol=1e-5)


def test_samples_go_different_ways_and_pay_for_what_ran(example):
    result = example.runner.run(example.inputs)
    assert len(result.work.unique(dim=0)) > 1
    everything = rerun(example, policy=example.family.never(example.policy))
    assert (result.macs <= everything.macs).all()
    assert result.macs.double().mean() < everything.macs.double().mean()
    assert result.exit_index.dtype == result.macs.dtype == torch.int64


def test_saving_nothing_answers_what_the_whole_network_says(example):
    say, counted = example.family.whole(example.network)
    with torch.no_grad():
        expected = tuple(say(example.inputs))[-1]
    found = rerun(example, policy=example.family.never(example.policy))
    torch.testing.assert_close(found.output, expected, rtol=1e-4, atol=1e-4)
    plain_macs = example.network.plain_macs(example.inputs)
    assert plain_macs.tolist() == counted.plain_macs(example.inputs).tolist()


@pytest.mark.parametrize("field", ["output", "work"])
def test_wrong_answers_are_refused_before_the_clock_starts(example, field):
    result = example.runner.run(example.inputs)
    check_agreement(result, example.runner, example.inputs)
    if field == "output":
        wrong = {"output": result.output + 1}
    else:
        names = ("blocks", "tokens", "exit_index")
        name = next(name for name in names if getattr(result, name) is not None)
        wrong = {name: 1 - getattr(result, name).long()}
    with pytest.raises(OfframpError, match="Nothing was timed"):
        check_agreement(replace(result, **wrong), example.runner, example.inputs)


def test_a_runner_goes_back_to_evaluation_mode(example):
    runner = example.runner
    first = runner.run(example.inputs).output
    example.network.train()
    assert torch.equal(runner.run(example.inputs).output, first)


def test_a_policy_of_another_family_is_refused(example):
    for other in FAMILIES.values():
        if other.as_trained is not None and other is not example.family:
            with pytest.raises(NotCalibratedError, match="offramp calibrate"):
                make_runner(example.network, other.as_trained)
    with pytest.raises(NotCalibratedError, match="offramp calibrate"):
        make_runner(example.network, None)
    with pytest.raises(InvalidArgumentError, match="add_exits"):
        family_of(torch.nn.Linear(2, 2))


def test_a_run_folder_keeps_network_and_policy(example, tmp_path):
    offramp.save(tmp_path / "run", example.network, policy=example.policy)
    other = copy.deepcopy(example.network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    run = offramp.load(tmp_path / "run", other)
    assert run.policy == example.policy
    found = make_runner(run.network, run.policy).run(example.inputs)
    assert torch.equal(found.output, example.runner.run(example.inputs).output)


def test_a_run_without_a_policy_has_that_of_training(example, tmp_path):
    offramp.save(tmp_path / "run", example.network)
    assert offramp.load(tmp_path / "run", example.network).policy == example.family.as_trained


def test_a_run_folder_refuses_a_policy_of_another_family(example, tmp_path):
    other = next(f for f in FAMILIES.values() if f.as_trained and f is not example.family)
    offramp.save(tmp_path / "run", example.network, policy=other.as_trained)
    with pytest.raises(offramp.ArtifactError, match="Calibrate the run again"):
        offramp.load(tmp_path / "run", example.network)


def choose(example, **target):
    thresholds = None if example.family.thresholds is None else "auto"
    evidence = offramp.collect(example.network, example.batches, thresholds=thresholds)
    return offramp.calibrate(evidence, **target)


@pytest.mark.filterwarnings("ignore::offramp.FewSamplesWarning")
@pytest.mark.parametrize("target", [{"max_drop": 0.1}, {"budget_share": 0.95}])
def test_calibrating_keeps_its_target_and_stands_for_its_policy(example, target):
    chosen = choose(example, **target)
    evaluation = offramp.evaluate(example.network, chosen, example.batches)
    assert evaluation.accuracy == pytest.approx(chosen.accuracy)
    assert evaluation.mean_macs == pytest.approx(chosen.mean_macs)
    if "max_drop" in target:
        lost = evaluation.final_exit_accuracy - evaluation.accuracy
        assert lost <= target["max_drop"] + 1e-9
    else:
        assert evaluation.mean_macs <= target["budget_share"] * evaluation.plain_macs


def test_dearer_thresholds_run_more(example):
    if example.family.thresholds is None:
        with pytest.raises(InvalidArgumentError, match="one threshold steers"):
            collect_sweep(example.network, example.batches)
        return
    sweep = collect_sweep(example.network, example.batches)
    assert sweep.thresholds == example.family.thresholds
    means = sweep.mean_macs_K.tolist()
    assert means == sorted(means)
    assert example.family.never(example.policy).threshold == sweep.thresholds[-1]


def test_an_evaluation_counts_what_ran(example):
    result = example.runner.run(example.inputs)
    evaluation = offramp.evaluate(example.network, example.policy, example.batches)
    is_right = result.output.argmax(1) == example.labels
    assert evaluation.num_samples == 40
    assert evaluation.accuracy == pytest.approx(float(is_right.double().mean()))
    assert evaluation.mean_macs == pytest.approx(float(result.macs.double().mean()))
    assert sum(row.share for row in evaluation.exits) == pytest.approx(1)
    assert f"{evaluation.mean_macs:,.0f}" in str(evaluation)


def test_a_timing_is_of_the_samples_that_ran(example):
    timing = time_runner(example.runner, example.inputs, batch_sizes=(4,), rounds=2)
    (row,) = timing.results
    assert min(row.plain_ms, row.all_exits_ms, row.adaptive_ms, row.never_exit_ms) > 0
    macs = example.runner.run(example.inputs).macs.double()
    plain_macs = example.network.plain_macs(example.inputs).double()
    assert timing.mean_macs == pytest.approx(float(macs.mean()))
    assert row.ideal_speedup == pytest.approx(float(plain_macs.sum() / macs.sum()))
    assert sum(timing.shares) == pytest.approx(1)
    has_stages = example.family.name == "exits"
    assert (row.stage_ms is not None, row.stage_bound is not None) == (has_stages, has_stages)
    assert json.loads(json.dumps(timing.to_dict()))["results"][0]["backend"] == "torch"


def test_a_task_trains_it(example):
    task = make_task(example.network)
    loss = task.loss((example.inputs,), example.labels)
    loss.backward()
    assert loss.isfinite()
    assert any(p.grad is not None and p.grad.any() for p in example.network.parameters())
    task.on_validation_epoch_start()
    assert len(task.answers((example.inputs,))) == example.network.num_exits
    for family in FAMILIES.values():
        if family.settings not in (None, example.family.settings):
            config = offramp.FitConfig(**{family.settings: SETTINGS[family.settings]})
            with pytest.raises(InvalidArgumentError, match=family.words.maker):
                make_task(example.network, config)


SETTINGS = {"gates": offramp.GateConfig(), "halting": offramp.HaltingConfig()}


def test_a_card_names_the_policy_and_the_figures_and_its_code_runs(example, tmp_path, monkeypatch):
    evaluation = offramp.evaluate(example.network, example.policy, example.batches).to_dict()
    check_evaluation(evaluation, recipe=None, policy=example.policy)
    about = {"recipe": None, "policy": example.policy, "calibration": None}
    card = model_card("net", **about, evaluation=evaluation)
    words = example.family.words
    assert f"## {words.heading}" in card
    assert f"| {words.less} | {100 * evaluation['accuracy']:.2f} % |" in card
    assert f"| {words.whole} |" in card
    code = card.split("```python\n")[1].split("```")[0]
    imported = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imported] == ["offramp"]
    offramp.save(tmp_path / "net", example.network, policy=example.policy)
    monkeypatch.chdir(tmp_path)
    runner = example.family.runner
    monkeypatch.setattr(offramp, runner.__name__, runner, raising=False)
    names = {"network": example.network, "inputs": example.inputs}
    exec(code, names)
    assert torch.equal(names["result"].macs, example.runner.run(example.inputs).macs)
