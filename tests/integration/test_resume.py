"""A run that was killed goes on with --resume and ends with the weights of an unbroken one."""

import json
import shutil
import time

import pytest
from safetensors.numpy import load_file

TRAIN = ("train", "digits-mlp", "--epochs", 12, "--device", "cpu")
SETTINGS = ("--set", "batch_size=16", "--set", "widths=24,256,512")


def metrics_lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_epochs(process, folder, *, epochs):
    while len(metrics_lines(folder)) < epochs:
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, start_offramp, finish_offramp):
    """Three runs of the same seed: unbroken, killed in training, killed before the first epoch."""
    root = tmp_path_factory.mktemp("resume")
    unbroken, killed, barely_begun = (root / name for name in ("unbroken", "killed", "begun"))
    to_end = start_offramp(*TRAIN, *SETTINGS, "--out", unbroken)
    to_kill = start_offramp(*TRAIN, *SETTINGS, "--out", killed)
    wait_for_epochs(to_kill, killed, epochs=2)
    to_kill.kill()  # SIGKILL
    to_kill.communicate()
    assert not (killed / "model.safetensors").exists()
    assert finish_offramp(to_end).code == 0

    barely_begun.mkdir()
    shutil.copy(unbroken / "recipe.json", barely_begun)
    resumed = [
        start_offramp(*TRAIN, *SETTINGS, "--out", folder, "--resume")
        for folder in (killed, barely_begun)
    ]
    outcomes = [finish_offramp(process) for process in resumed]
    return unbroken, {"killed": (killed, outcomes[0]), "begun": (barely_begun, outcomes[1])}


@pytest.mark.parametrize("which", ["killed", "begun"])
def test_resumed_weights_are_those_of_the_unbroken_run(folders, which):
    unbroken, resumed = folders
    folder, outcome = resumed[which]
    assert outcome.code == 0, outcome.stderr
    expected, found = (load_file(run / "model.safetensors") for run in (unbroken, folder))
    assert expected.keys() == found.keys()
    different = [name for name in expected if expected[name].tobytes() != found[name].tobytes()]
    assert different == []


@pytest.mark.parametrize("which", ["killed", "begun"])
def test_resumed_metrics_hold_every_epoch_once(folders, which):
    unbroken, resumed = folders
    folder, _ = resumed[which]

    def what_does_not_depend_on_the_clock(line):
        record = json.loads(line)
        return record["epoch"], record["train_loss"], record["exit_accuracy"]

    expected, found = (
        [what_does_not_depend_on_the_clock(line) for line in metrics_lines(run)]
        for run in (unbroken, folder)
    )
    assert [epoch for epoch, _, _ in found] == list(range(1, 13))
    assert found == expected


def test_a_killed_run_does_not_train_its_epochs_again(folders):
    _, resumed = folders
    _, outcome = resumed["killed"]
    assert "epoch 1/12" not in outcome.stdout
    assert "epoch 12/12" in outcome.stdout


def test_a_finished_run_is_left_alone(folders, offramp):
    unbroken, _ = folders
    before = (unbroken / "model.safetensors").read_bytes()
    outcome = offramp(*TRAIN, *SETTINGS, "--out", unbroken, "--resume")
    assert outcome.code == 0, outcome.stderr
    assert "already" in outcome.stdout
    assert (unbroken / "model.safetensors").read_bytes() == before


def test_resume_without_a_run_starts_one(workplace, offramp):
    outcome = offramp("train", "--epochs", 1, "--set", "widths=8,8", "--out", "new", "--resume")
    assert outcome.code == 0, outcome.stderr
    assert len(metrics_lines(workplace / "new")) == 1
