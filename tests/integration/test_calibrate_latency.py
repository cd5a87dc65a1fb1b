"""``offramp calibrate --for latency``: times the parts, and says which exits do not pay."""

import json

import pytest

import offramp.calibration.latency as latency_module
import offramp.workflow.export as export_module


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_policy_and_profile_are_written(run, offramp, backend):
    asked = ("--max-drop", "0.02", "--for", "latency", "--batch-size", "8", "--backend", backend)
    outcome = offramp("calibrate", run, *asked)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "ms a batch of 8, plain network" in outcome.stdout
    profile = json.loads((run / "profile.json").read_text())
    assert (profile["backend"], profile["sizes"]) == (backend, [1, 4, 8])
    assert [len(part) for part in profile["stage_ms"]] == [3, 3, 3]
    policy = json.loads((run / "policy.json").read_text())
    assert policy["asked"]["for"] == "latency"
    assert policy["reached"]["accuracy"] > 0.9
    off = [line for line in outcome.stdout.splitlines() if " off: a batch of 8 takes " in line]
    assert len(off) <= policy["policy"]["thresholds"].count(None)
    assert offramp("evaluate", run).code == 0


def test_exits_that_do_not_pay_are_named(run, offramp, monkeypatch):
    """With a gain that nothing misses, every exit goes."""
    monkeypatch.setattr(latency_module, "_LEAST_GAIN", -1e9)
    asked = ("--max-drop", "0.02", "--for", "latency", "--backend", "torch")
    outcome = offramp("calibrate", run, *asked)
    lines = outcome.stdout.splitlines()
    assert {line[:10] for line in lines if "asking there takes" in line} == {
        "exit 0 off",
        "exit 1 off",
    }
    policy = json.loads((run / "policy.json").read_text())
    assert policy["policy"]["thresholds"] == [None, None]


def test_int8_chooses_anew_for_the_target_alone(run, offramp, monkeypatch):
    monkeypatch.setattr(export_module, "SHARE_TOLERANCE", -1.0)  # any move is too much
    monkeypatch.setattr(latency_module, "_LEAST_GAIN", 1.0)  # no exit goes
    asked = ("--max-drop", "0.0", "--for", "latency", "--backend", "torch")
    assert offramp("calibrate", run, *asked).code == 0
    outcome = offramp("export", run, "--quantize", "int8", "--no-plain", "--out", "int8")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert [line.split()[0] for line in outcome.stdout.splitlines()][1:4] == [
        *("float32", "int8", "anew")
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--for speed --max-drop 0.01", ("--for must be latency", "'speed'")),
        ("--for latency --budget-macs 100000", ("--max-drop",)),
        ("--for latency --thresholds 0.5,0.5", ("--max-drop",)),
        ("--for latency --max-drop 0.01 --backend tpu", ("torch or onnxruntime", "'tpu'")),
        ("--for latency --max-drop 0.01 --batch-size 0", ("batch size", "Got 0")),
        ("--for latency --max-drop 0.01 --batch-size 99999", ("batch size", "99999")),
        ("--for latency --max-drop 2 --backend torch", ("'max_drop'", "Got 2")),
        ("--max-drop 0.01 --batch-size 8", ("--batch-size", "--for latency")),
        ("--max-drop 0.01 --backend torch", ("--backend", "--for latency")),
    ],
)
def test_wrong_input_is_refused(run, refuses, options, words):
    refuses("calibrate", "run", *options.split(), words=words)
