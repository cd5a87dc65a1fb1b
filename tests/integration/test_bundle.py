"""A run exported by the command line, and run where there is no torch."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from offramp.runtime import Session, read_bundle

ROOT = Path(__file__).parents[2]
RUN_BUNDLE = """
import sys
sys.modules["torch"] = None
import numpy as np
from offramp.runtime import Session
folder, inputs, outputs = sys.argv[1:]
result = Session(folder, threads=1).run(np.load(inputs))
np.savez(outputs, output=result.output, exit_index=result.exit_index, macs=result.macs)
"""


@pytest.fixture
def bundle(exported_run):
    """The bundle that ``offramp export run`` leaves."""
    return exported_run / "bundle"


def test_export_says_what_was_compared_and_where_the_bundle_is(export_digits):
    run = export_digits("0.4,0.6")
    lines = (run.parent / "said.txt").read_text().splitlines()
    assert lines[0].startswith("3 steps answer 269 samples as torch does")
    assert lines[-1] == f"exported {run}: {run / 'bundle'}"


def samples(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, 1, 8, 8)).astype(np.float32)


def run_elsewhere(python, bundle, workplace):
    """Answers of the bundle in a process that cannot import torch."""
    np.save(workplace / "inputs.npy", samples(100))
    outcome = subprocess.run(
        [python, "-c", RUN_BUNDLE, bundle, "inputs.npy", "outputs.npz"],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    return np.load(workplace / "outputs.npz")


def assert_same_answers(found, bundle):
    expected = Session(bundle, threads=1).run(samples(100))
    assert found["exit_index"].tolist() == expected.exit_index.tolist()
    assert found["macs"].tolist() == expected.macs.tolist()
    np.testing.assert_allclose(found["output"], expected.output, atol=1e-4)


def test_bundle_runs_where_torch_cannot_be_imported(bundle, workplace):
    assert_same_answers(run_elsewhere(sys.executable, bundle, workplace), bundle)


@pytest.mark.slow
def test_bundle_runs_where_torch_never_was(bundle, workplace):
    venv.create("env", with_pip=True)
    python = workplace / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", ROOT]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    assert_same_answers(run_elsewhere(python, bundle, workplace), bundle)
    size = sum(file.stat().st_size for file in (workplace / "env").rglob("*") if file.is_file())
    assert size < 250e6
    timed = "import time; t = time.perf_counter(); import offramp.runtime; "
    timed += "print(time.perf_counter() - t)"
    seconds = [
        float(subprocess.run([python, "-c", timed], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.4


def test_the_plain_network_can_be_left_out(calibrated_run, offramp):
    assert offramp("export", calibrated_run, "--no-plain", "--out", "small").code == 0
    assert read_bundle("small").plain_file is None
    assert not os.path.exists("small/plain.onnx")


def test_int8_reports_what_it_does_and_chooses_thresholds_anew(run, offramp):
    assert offramp("calibrate", run, "--max-drop", "0.0").code == 0
    outcome = offramp("export", run, "--quantize", "int8", "--out", "int8")
    assert (outcome.code, outcome.stderr) == (0, "")
    rows = [line.split()[0] for line in outcome.stdout.splitlines()]
    assert rows[1:3] == ["float32", "int8"]
    made = read_bundle("int8")
    assert made.quantized == "int8"
    thresholds = json.loads((run / "policy.json").read_text())["policy"]["thresholds"]
    if "anew" in rows:
        assert [step.threshold for step in made.steps[:-1]] != thresholds
    weights = sum(step.parameter_bytes for step in made.steps)
    assert weights < 0.4 * sum(4 * n for n in (64 * 128, 128 * 256, 256 * 256, 640 * 10))


def test_engines_are_timed_in_turn_each_in_its_own_process(bundle, offramp):
    run = bundle.parent
    outcome = offramp(
        "time", run, "--backend", "torch,onnxruntime", "--batch-size", "1,64", "--json", "-"
    )
    assert (outcome.code, outcome.stderr) == (0, "")
    timing = json.loads(outcome.stdout)
    assert {"python", "torch", "onnxruntime"} == set(timing["versions"])
    found = [(row["backend"], row["batch_size"]) for row in timing["results"]]
    assert found == [(name, size) for size in (1, 64) for name in ("torch", "onnxruntime")]
    for row in timing["results"]:
        assert len(row["stage_ms"]) == 3
        assert min(row["plain_ms"], row["all_exits_ms"], row["never_exit_ms"]) > 0
        assert row["stage_bound"] > 0
    last = [row["stage_ms"] for row in timing["results"] if row["backend"] == "onnxruntime"]
    assert list(timing["stage_ms"].values()) == last


def test_bundle_of_another_policy_is_not_timed(bundle, offramp, refuses):
    assert offramp("calibrate", "run", "--thresholds", "0.1,0.1").code == 0
    refuses("time", "run", "--backend", "onnxruntime", words=("another policy", "offramp export"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("time run --backend tpu", ("torch, onnxruntime", "'tpu'")),
        ("time run --backend onnxruntime", ("run/bundle", "offramp export")),
        ("export run --quantize int4", ("int8", "int4")),
        ("export run --out file/bundle", ("file/bundle", "--out")),
        ("export run --out full", ("full", "no bundle", "--out")),
        ("export nowhere", ("nowhere", "recipe.json")),
    ],
)
def test_wrong_input_is_refused(calibrated_run, workplace, refuses, command, words):
    (workplace / "file").write_text("no folder")
    (workplace / "full").mkdir()
    (workplace / "full" / "letter.txt").write_text("dear reader")
    refuses(*command.split(), words=words)


def test_run_without_a_policy_is_refused(run, refuses):
    refuses("export", "run", words=("policy", "offramp calibrate run"))
