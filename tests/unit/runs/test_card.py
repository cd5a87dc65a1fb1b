import ast
import re
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard

from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.model.checkpoint import save_weights
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy, never_leave
from offramp.policy.routing_policy import GatePolicy
from offramp.recipes.exits import find_recipe
from offramp.runs.card import check_evaluation, model_card
from offramp.runs.hub import save_pretrained
from offramp.runs.run import create_folder, load, save, write_policy, write_recipe

POLICY = ThresholdPolicy((float("inf"), 0.75), rule="margin", temperatures=(1.0, 1.5, 2.0))
CALIBRATION = {
    "asked": {
        "max_drop": 0.0,
        "budget_macs": 1450000.0,
        "risk": None,
        "rule": "margin",
        "guarantee": 0.9,
    },
    "data": {
        "name": "digits",
        "split": "calibration",
        "num_samples": 2690,
        "class_prior": "as in train",
    },
    "reached": {"accuracy": 0.94321, "mean_macs": 12345.6},
    "guarantee": {"sentence": "With probability at least 90 %, it holds."},
}
FIGURES = {
    "recipe": "digits-mlp",
    "split": "test",
    "num_samples": 4500,
    "accuracy": 0.95125,
    "mean_macs": 12345.0,
    "plain_macs": 49380,
    "final_exit_accuracy": 0.961,
    "plain_accuracy": None,
    "exits": [
        {"index": 0, "accuracy": 0.901, "share": 0.0, "macs": 8000},
        {"index": 1, "accuracy": 0.95, "share": 0.75, "macs": 10000},
        {"index": 2, "accuracy": 0.961, "share": 0.25, "macs": 49380},
    ],
}


@pytest.fixture
def recipe():
    return find_recipe("digits-mlp")


def card(recipe, *, policy=POLICY, calibration=CALIBRATION, evaluation=FIGURES, name="user/net"):
    return model_card(
        name, recipe=recipe, policy=policy, calibration=calibration, evaluation=evaluation
    )


def code_of(text):
    return re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]


def test_front_matter_is_what_the_hub_reads(recipe):
    data = ModelCard(card(recipe)).data
    assert data.library_name == "offramp"
    assert "early-exit" in data.tags
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["digits"]
    assert data.metrics == ["accuracy"]
    assert data.model_name == "net"
    found = [(result.dataset_split, result.metric_value) for result in data.eval_results]
    assert found == [("test", 0.95125), ("test", 0.961)]


def test_measured_table_holds_the_figures(recipe):
    text = card(recipe)
    assert "On 4,500 samples of the split test of `digits`." in text
    assert "| 1 | 95.00 % | 75.00 % | 10,000 |" in text
    assert "| leaving early | 95.12 % | 12,345 on average, 25.00 % of the plain" in text
    assert "| every sample to the final exit | 96.10 % | 49,380 |" in text
    assert "No plain network trained as long was measured" in text
    beside = card(recipe, evaluation=FIGURES | {"plain_accuracy": 0.955})
    assert "A plain network trained as long, on the same samples: accuracy 95.50 %." in beside


def test_card_of_maps_puts_mean_iou_before_the_share_of_right_pixels():
    ious = (0.31, 0.42, 0.43)
    rows = [row | {"mean_iou": iou} for row, iou in zip(FIGURES["exits"], ious, strict=True)]
    maps = {"mean_iou": 0.42, "final_exit_mean_iou": 0.43, "plain_mean_iou": 0.44}
    figures = FIGURES | maps | {"recipe": "camvid-seg", "split": "val", "exits": rows}
    recipe = find_recipe("camvid-seg")
    check_evaluation(figures, recipe=recipe, policy=POLICY)
    reached = CALIBRATION | {"reached": {**CALIBRATION["reached"], "mean_iou": 0.4321}}
    text = card(recipe, evaluation=figures, calibration=reached)
    assert "in sample: mean IoU 43.21 %" in text
    assert "| exit | mean IoU alone |" in text
    assert "| 1 | 42.00 % | 75.00 % | 10,000 |" in text
    assert "| leaving early | 42.00 % | 95.12 % | 12,345 on average" in text
    assert "| every sample to the final exit | 43.00 % | 96.10 % | 49,380 |" in text
    assert "on the same samples: mean IoU 44.00 %." in text
    data = ModelCard(text).data
    assert data.pipeline_tag == "image-segmentation"
    assert data.metrics == ["accuracy", "mean_iou"]
    found = [(result.metric_type, result.metric_value) for result in data.eval_results]
    assert found[:2] == [("mean_iou", 0.42), ("mean_iou", 0.43)]
    with pytest.raises(InvalidArgumentError, match="in \\[0, 1\\]"):
        check_evaluation(figures | {"final_exit_mean_iou": 43}, recipe=recipe, policy=POLICY)


def test_without_figures_there_is_none_and_the_command_is_named(recipe):
    text = card(recipe, evaluation=None)
    measured = text.split("## Measured")[1]
    assert "Nothing was measured" in measured
    assert "offramp push RUN REPO" in measured
    assert not re.search(r"\d %", measured)
    assert ModelCard(text).data.eval_results is None
    assert ModelCard(text).data.metrics is None


def test_figures_in_sample_are_labelled_and_kept_from_the_index(recipe):
    text = card(recipe, evaluation=FIGURES | {"in_sample": True})
    assert "IN SAMPLE" in text
    assert ModelCard(text).data.eval_results is None


def test_policy_is_told_with_what_was_asked_and_promised(recipe):
    text = card(recipe)
    assert "rule `margin`" in text
    assert "| 0 | never: this exit is off | 1 |" in text
    assert "| 1 | 0.7500 | 1.5 |" in text
    assert "| 2 | always: it is the final exit | |" in text
    assert "Asked: max_drop 0, budget_macs 1,450,000, rule margin, guarantee 0.9." in text
    assert "2,690 samples of the split calibration of `digits` (classes as in train)" in text
    assert "accuracy 94.32 % at 12,346 mean MACs" in text
    assert "\n> With probability at least 90 %, it holds.\n" in text


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (None, "not recorded"),
        ({"asked": {"thresholds": "0.4,off"}, "data": None, "reached": None}, "Set by hand"),
        (CALIBRATION | {"guarantee": None}, "in sample"),
    ],
)
def test_policy_without_a_promise_promises_nothing(recipe, calibration, words):
    text = card(recipe, calibration=calibration)
    assert words in text
    assert "promise" not in text


def test_other_policies_and_none(recipe):
    patient = card(recipe, policy=PatiencePolicy(2, 3), calibration=None)
    assert "2 exits in agreement" in patient
    assert "There is one exit" in card(recipe, policy=never_leave(1), calibration=None)
    nothing = card(recipe, policy=None, calibration=None, evaluation=None)
    assert "offramp calibrate RUN" in nothing


@pytest.mark.parametrize(
    "change",
    [
        {"data": {}},
        {"reached": 5},
        {"asked": [1]},
        {"guarantee": {"sentence": None, "x": 1}, "data": 3},
    ],
)
def test_damaged_account_of_the_choice_is_refused(recipe, change):
    with pytest.raises(ArtifactError, match=r"policy\.json is damaged"):
        card(recipe, calibration=CALIBRATION | change)


# The code in the card


@pytest.mark.parametrize("policy", [never_leave(3), None])
def test_code_runs(recipe, tmp_path, monkeypatch, capsys, policy):
    folder = create_folder(tmp_path / "run")
    write_recipe(folder, recipe=recipe, class_names=(), data=None)
    save_weights(recipe.build_network(), folder / "model.safetensors")
    if policy is not None:
        write_policy(folder, policy)
    text = (save_pretrained(folder, tmp_path / "net") / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code_of(text), names)
    if policy is None:
        assert [logits.shape for logits in names["logits"]] == [(2, 10)] * 3
    else:
        assert names["result"].exit_index.tolist() == [2, 2]
        assert "tensor" in capsys.readouterr().out


def test_code_for_an_own_network_runs_with_its_network(network, tmp_path, monkeypatch):
    save(tmp_path / "net", network, policy=never_leave(3))
    monkeypatch.chdir(tmp_path)
    text = card(None, name="net", policy=never_leave(3), calibration=None, evaluation=None)
    names = {"network": network, "inputs": torch.zeros(2, 6)}
    exec(code_of(text), names)
    assert names["run"].policy == load("net", network).policy
    assert ModelCard(text).data.datasets is None


def test_code_for_texts_names_what_there_is(recipe):
    text = card(replace(recipe, data="trec6", normalisation=None), evaluation=None)
    assert ModelCard(text).data.pipeline_tag == "text-classification"
    imports = [node for node in ast.parse(code_of(text)).body if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imports] == ["offramp"]  # a card outlives a private module
    exec(compile(ast.Module(imports, type_ignores=[]), "card", "exec"), {})


# Networks that skip blocks

SKIPPING = FIGURES | {
    "recipe": "emnist-skipnet",
    "exits": [{"index": 0, "accuracy": 0.961, "share": 1.0, "macs": 12345}],
    "blocks": {"run_rates": [1.0, 0.125], "saved": 0.4375, "macs_saved": 0.75},
}


@pytest.fixture
def skip_recipe():
    options = {"widths": (8, 8), "blocks": (0, 3)}
    recipe = find_recipe("emnist-skipnet")
    return replace(recipe, network_options={**recipe.network_options, **options})


def test_card_of_gates_tells_threshold_and_blocks(skip_recipe):
    text = card(skip_recipe, policy=GatePolicy(0.3), evaluation=SKIPPING)
    assert "A network that skips blocks input by input, trained on `emnist47`" in text
    assert "## Which blocks run" in text
    assert "its gate's probability is at least 0.3000." in text
    assert "2,690 samples of the split calibration" in text
    assert "| 1 | 12.50 % |" in text
    assert "| skipping blocks | 95.12 % | 12,345 on average, 25.00 % of the plain" in text
    assert "25.00 % of the plain network's 49,380 |" in text
    assert "| every block run | 96.10 % |  |" in text  # what gates take is not said
    data = ModelCard(text).data
    assert data.tags == ["skipnet", "adaptive-computation"]
    assert [r.metric_name for r in data.eval_results] == [
        "accuracy with blocks skipped",
        "accuracy with every block run",
    ]


def test_card_of_gates_that_run_as_they_were_trained(skip_recipe):
    text = card(skip_recipe, policy=GatePolicy(), calibration=None, evaluation=None)
    assert "at least 0.5000. No other was chosen" in text


def test_damaged_account_of_the_choice_of_gates_is_refused(skip_recipe):
    with pytest.raises(ArtifactError, match=r"policy\.json is damaged"):
        card(skip_recipe, policy=GatePolicy(), calibration={"asked": [1]}, evaluation=None)


def test_code_for_gates_runs(skip_recipe, tmp_path, monkeypatch, capsys):
    folder = create_folder(tmp_path / "run")
    write_recipe(folder, recipe=skip_recipe, class_names=(), data=None)
    save_weights(skip_recipe.build_network(), folder / "model.safetensors")
    text = (save_pretrained(folder, tmp_path / "net") / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code_of(text), names)
    assert names["result"].blocks.shape == (2, 2)
    assert "tensor" in capsys.readouterr().out


@pytest.mark.parametrize("blocks", [None, {}, {"run_rates": [2.0], "saved": 0.5}])
def test_figures_of_gates_need_their_blocks(skip_recipe, blocks):
    check_evaluation(SKIPPING, recipe=skip_recipe, policy=GatePolicy())
    with pytest.raises(InvalidArgumentError, match="Expected"):
        check_evaluation(SKIPPING | {"blocks": blocks}, recipe=skip_recipe, policy=GatePolicy())


# Figures that are let pass


def test_figures_of_an_own_network_name_no_data():
    own = {key: value for key, value in FIGURES.items() if key not in ("recipe", "split")}
    check_evaluation(own, recipe=None, policy=POLICY)
    text = card(None, evaluation=own)
    assert "On 4,500 samples; which ones is not recorded." in text
    assert ModelCard(text).data.eval_results is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits": []}, "shares that sum to 1"),
        ({"exits": [{"index": "x", "accuracy": 1, "share": 1, "macs": 9}]}, "Expected the fig"),
        ({"exits": None}, "Expected the figures that offramp evaluate"),
        ({"exits": [{"index": 0}]}, "Expected the figures that offramp evaluate"),
        ({"accuracy": "95 %"}, "Expected the figures that offramp evaluate"),
        ({"accuracy": 95.1}, "accuracies in"),
        ({"accuracy": float("nan")}, "accuracies in"),
        ({"mean_macs": float("inf")}, "positive counts"),
        ({"num_samples": 0}, "positive counts"),
        ({"recipe": "emnist-mlp"}, "of the recipe 'emnist-mlp'. The run is of 'digits-mlp'"),
        ({"exits": [{"index": 0, "accuracy": 1, "share": 1, "macs": 9}]}, "1 exit. The run has 3"),
    ],
)
def test_what_is_no_evaluation_of_this_run_is_refused(recipe, change, message):
    check_evaluation(FIGURES, recipe=recipe, policy=POLICY)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        check_evaluation(FIGURES | change, recipe=recipe, policy=POLICY)
    assert "\n" not in str(caught.value)


def test_figures_need_a_policy_and_the_recipe_that_they_name(recipe):
    with pytest.raises(InvalidArgumentError, match="has no policy"):
        check_evaluation(FIGURES, recipe=recipe, policy=None)
    with pytest.raises(InvalidArgumentError, match="of no recipe"):
        check_evaluation(FIGURES, recipe=None, policy=POLICY)
    with pytest.raises(InvalidArgumentError, match="Expected the figures"):
        check_evaluation({}, recipe=recipe, policy=POLICY)


def test_bundle_may_leave_out_an_exit_that_is_off(recipe):
    rows = FIGURES["exits"][1:]
    check_evaluation(FIGURES | {"exits": rows}, recipe=recipe, policy=POLICY)
