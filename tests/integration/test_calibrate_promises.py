"""``offramp calibrate``: promises, budgets of every kind, temperatures, patience and priors."""

import json

import pytest

from offramp.data.images import make_loader
from offramp.runs.run import load, load_batches
from offramp.training.checkpoint_choice import note_choice, write_choice


def policy_of(run) -> dict:
    return json.loads((run / "policy.json").read_text())


def test_promise_is_printed_and_written(run, offramp):
    outcome = offramp("calibrate", run, "--max-drop", "0.05", "--guarantee", "0.9")
    assert (outcome.code, outcome.stderr) == (0, "")
    content = policy_of(run)
    promise, data = content["guarantee"], content["data"]
    assert content["asked"] == {"max_drop": 0.05, "guarantee": 0.9, "rule": "entropy"}
    assert (promise["risk"], promise["max_risk"], promise["probability"]) == (
        *("accuracy_gap", 0.05, 0.9),
    )
    sentence = outcome.stdout.splitlines()[-1]
    assert promise["sentence"] == sentence
    assert sentence == (
        f"With probability at least 90 % over the draw of {data['num_samples']} calibration "
        "samples (digits, classes as in train), early exit loses at most 5 percentage points of "
        "accuracy against the final exit on new samples drawn alike."
    )
    assert promise["num_tested"] == promise["num_samples"] == data["num_samples"]
    assert (promise["found_on"], promise["num_finding"] > promise["num_tested"]) == ("train", True)
    assert f"prepared on {promise['num_finding']:,} train samples)" in outcome.stdout
    assert f"{promise['num_passed']} of {promise['num_candidates']} candidates" in outcome.stdout
    assert offramp("evaluate", run).code == 0
    assert offramp("evaluate", run, "--split", "calibration").code == 2


@pytest.mark.parametrize("fitted", [("--temperatures", "all"), ("--rule", "learned")])
def test_a_promise_of_what_is_fitted_parts_the_samples(run, offramp, fitted):
    outcome = offramp("calibrate", run, "--max-drop", "0.1", "--guarantee", "0.8", *fitted)
    assert (outcome.code, outcome.stderr) == (0, "")
    promise = policy_of(run)["guarantee"]
    assert promise["found_on"] == "calibration"
    assert promise["num_tested"] + promise["num_finding"] == promise["num_samples"]


@pytest.mark.parametrize(
    ("risk", "target", "words"),
    [
        ("disagreement", "0.2", "at most 20 % of the answers differ from the final exit's"),
        ("error", "0.3", "at most 30 % of the answers are wrong"),
        ("brier_gap", "0.1", "Brier score (in [0, 1]) is at most 0.1 above"),
    ],
)
def test_other_risks_are_promised(run, offramp, risk, target, words):
    asked = ("--max-risk", target, "--risk", risk, "--guarantee", "0.8")
    outcome = offramp("calibrate", run, *asked)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert words in outcome.stdout.splitlines()[-1]
    assert policy_of(run)["asked"]["risk"] == risk


def test_promise_on_average(run, offramp):
    asked = ("--max-risk", "0.1", "--risk", "disagreement", "--guarantee", "mean")
    outcome = offramp("calibrate", run, *asked)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.splitlines()[-1].startswith("On average over draws of ")
    assert policy_of(run)["guarantee"]["probability"] is None


def test_what_cannot_be_promised_says_what_would_do_and_leaves_the_policy(calibrated_run, offramp):
    before = (calibrated_run / "policy.json").read_bytes()
    outcome = offramp("calibrate", calibrated_run, "--max-drop", "0.001", "--guarantee", "0.95")
    assert outcome.code == 2
    (line,) = outcome.stderr.splitlines()
    assert "cannot promise a target of 0.001: about " in line
    assert " would do" in line
    assert (calibrated_run / "policy.json").read_bytes() == before


def test_samples_that_chose_the_checkpoint_promise_nothing(run, offramp):
    loaded = load(run)
    samples, *_ = load_batches(loaded.recipe, "calibration")
    note_choice(loaded.network, "EarlyStopping by 'val_loss'", make_loader(samples, batch_size=64))
    write_choice(run, loaded.network)
    outcome = offramp("calibrate", run, "--max-drop", "0.05", "--guarantee", "0.9")
    assert outcome.code == 2
    (line,) = outcome.stderr.splitlines()
    assert "chose its checkpoint in training (EarlyStopping by 'val_loss')" in line
    assert offramp("calibrate", run, "--max-drop", "0.05").code == 0


def test_without_a_promise_none_is_written(run, offramp):
    assert offramp("calibrate", run, "--max-risk", "0.05", "--risk", "disagreement").code == 0
    assert policy_of(run)["guarantee"] is None


def test_share_is_kept(run, offramp):
    outcome = offramp("calibrate", run, "--budget-share", "0.7")
    assert (outcome.code, outcome.stderr) == (0, "")
    shown = outcome.stdout.splitlines()[-1]
    share = float(shown.split(" mean MACs, ")[1].split(" %")[0])
    assert 30 < share <= 70


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_milliseconds_are_kept_by_prediction(run, offramp, backend):
    # A second is always enough.
    asked = ("--backend", backend, "--batch-size", "4")
    outcome = offramp("calibrate", run, "--budget-ms", "1000", *asked)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "ms a batch of 4, plain network" in outcome.stdout
    assert policy_of(run)["asked"] == {
        "budget_ms": 1000,
        "rule": "entropy",
        "batch_size": 4,
        "backend": backend,
    }


def test_milliseconds_that_cannot_be_are_refused(run, offramp):
    asked = ("--budget-ms", "0.000001", "--backend", "torch", "--batch-size", "4")
    outcome = offramp("calibrate", run, *asked)
    assert outcome.code == 2
    assert "'budget_ms' parameter must be at least" in outcome.stderr


@pytest.mark.parametrize("temperatures", ["all", "survivors"])
def test_temperatures_are_fitted_shown_and_kept(run, offramp, temperatures):
    asked = ("--max-drop", "0.05", "--temperatures", temperatures)
    outcome = offramp("calibrate", run, *asked)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert {"temperature", "ECE", "Brier", "AUROC"} <= set(outcome.stdout.split())
    kept = policy_of(run)["policy"]["temperatures"]
    assert len(kept) == 3
    assert kept != [1, 1, 1]
    assert offramp("evaluate", run).code == 0


def test_patience_is_kept_and_runs(run, offramp):
    outcome = offramp("calibrate", run, "--max-drop", "0.05", "--patience", "2")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "2 exits in a row" in outcome.stdout
    policy = policy_of(run)["policy"]
    assert (policy["kind"], policy["patience"]) == ("patience", 2)
    assert offramp("evaluate", run).code == 0


def test_learned_controller_is_kept_runs_and_is_exported(run, offramp):
    outcome = offramp("calibrate", run, "--budget-share", "0.8", "--rule", "learned")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert policy_of(run)["policy"]["kind"] == "controller"
    assert policy_of(run)["asked"] == {"budget_share": 0.8, "rule": "learned"}
    assert offramp("export", run, "--no-plain").code == 0
    in_torch, in_onnxruntime = (
        json.loads(offramp("evaluate", artifact, "--json", "-").stdout)
        for artifact in (run, run / "bundle")
    )
    assert in_torch["accuracy"] == pytest.approx(in_onnxruntime["accuracy"], abs=0.01)
    assert in_torch["mean_macs"] == pytest.approx(in_onnxruntime["mean_macs"], rel=0.01)
    assert offramp("export", run, "--quantize", "int8", "--no-plain", "--out", "int8").code == 0


def test_prior_weights_the_samples(run, offramp, workplace):
    drawn = offramp("calibrate", run, "--max-drop", "0.02", "--prior", "uniform")
    assert (drawn.code, drawn.stderr) == (0, "")
    data = policy_of(run)["data"]
    assert (data["class_prior"], data["weighted"]) == ("uniform", True)
    (workplace / "prior.json").write_text(json.dumps({"0": 0.9, "1": 0.1}))
    asked = ("--max-drop", "0.2", "--prior", "prior.json", "--guarantee", "0.8")
    outcome = offramp("calibrate", run, *asked)
    assert (outcome.code, outcome.stderr) == (0, "")
    data = policy_of(run)["data"]
    assert {name: share for name, share in data["class_prior"].items() if share} == {
        "0": 0.9,
        "1": 0.1,
    }
    assert data["effective_num_samples"] < data["num_samples"] / 3
    assert "classes as given by weights, effective number" in outcome.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ("Cannot read", "prior.json")),
        ("[1, 2]", ("shares by class name",)),
        ('{"ten": 1}', ("shares by class name",)),
        ('{"0": "half"}', ("shares by class name",)),
        ('{"0": 0.5}', ("sum to 1", "0.5")),
        ('{"0": 1.5, "1": -0.5}', ("shares",)),
    ],
)
def test_wrong_priors_are_refused(run, refuses, workplace, content, words):
    (workplace / "prior.json").write_text(content)
    refuses("calibrate", "run", "--max-drop", "0.01", "--prior", "prior.json", words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", ("exactly one of", "--budget-share")),
        ("--max-drop 0.01 --budget-share 0.5", ("exactly one of",)),
        ("--budget-macs 5 --guarantee 0.9", ("--guarantee", "--max-drop")),
        ("--max-drop 0.01 --guarantee yes", ("--guarantee", "'yes'")),
        ("--max-drop 0.01 --guarantee 1.5", ("guarantee", "1.5")),
        ("--max-drop 0 --guarantee 0.9", ("target above 0",)),
        ("--max-drop 0.01 --guarantee 0.9 --for latency", ("--guarantee and --for latency",)),
        ("--max-drop 0.01 --risk error", ("--risk", "--max-risk")),
        ("--max-risk 0.01 --risk luck", ("disagreement", "'luck'")),
        ("--max-risk 0.0001 --risk error", ("must be allowed to reach",)),
        ("--budget-share 0", ("share of the plain network's", "Got 0")),
        ("--budget-share nan", ("share of the plain network's", "nan")),
        ("--budget-ms -1 --backend torch", ("'budget_ms'", "-1")),
        ("--max-drop 0.01 --temperatures hot", ("all or survivors", "'hot'")),
        ("--max-drop 0.01 --temperatures all --patience 2", ("--patience and --temperatures",)),
        ("--budget-ms 1 --temperatures survivors", ("survivors", "--temperatures all")),
        ("--thresholds 0.5,0.5 --patience 2", ("--patience and --thresholds",)),
        ("--max-drop 0.01 --rule learned --patience 2", ("--patience and --rule learned",)),
        ("--max-drop 0.01 --patience 1", ("'patience'", "at least 2")),
        ("--max-drop 0.01 --patience 3", ("--patience", "3 exits", "Got 3")),
        ("--max-drop 0.01 --rule entropy_nats", ("rule must be", "'entropy_nats'")),
        ("--thresholds 0.5,0.5 --prior uniform", ("--prior", "--thresholds")),
        ("--max-drop 0.01 --prior nowhere.json", ("--prior", "nowhere.json")),
    ],
)
def test_wrong_input_is_refused(run, refuses, options, words):
    refuses("calibrate", "run", *options.split(), words=words)
