"""A run that was killed goes on with --resume and ends with the weights of an unbroken one."""

import json
import shutil
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.numpy import load_file
from torch import nn
from torch.utils.data import TensorDataset

import offramp as offramp_library

TRAIN = ("train", "digits-mlp", "--epochs", 8, "--device", "cpu")
# All that is drawn at random is switched on: order, class balance, augmentation.
SETTINGS = tuple(
    f"--set={setting}"
    for setting in ("batch_size=32", "widths=24,64,64", "augment=true", "class_balance=sampling")
)


def metrics_lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_epochs(process, folder, *, epochs):
    while len(metrics_lines(folder)) < epochs:
        assert process.poll() is None, "training ended before it could be killed"
        time.sleep(0.01)


@contextmanager
def one_thread():
    """As in the process that is killed, so that weights can be compared bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, start_offramp, offramp):
    """Three runs of the same seed: unbroken, killed in training, killed before the first epoch."""
    root = tmp_path_factory.mktemp("resume")
    unbroken, killed, barely_begun = (root / name for name in ("unbroken", "killed", "begun"))
    to_kill = start_offramp(*TRAIN, *SETTINGS, "--out", killed)
    wait_for_epochs(to_kill, killed, epochs=2)
    to_kill.kill()  # SIGKILL
    to_kill.communicate()
    assert not (killed / "model.safetensors").exists()
    with one_thread():
        assert offramp(*TRAIN, *SETTINGS, "--out", unbroken).code == 0

        barely_begun.mkdir()
        shutil.copy(unbroken / "recipe.json", barely_begun)
        outcomes = [
            offramp(*TRAIN, *SETTINGS, "--out", folder, "--resume")
            for folder in (killed, barely_begun)
        ]
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
    assert [epoch for epoch, _, _ in found] == list(range(1, 9))
    assert found == expected


def test_a_killed_run_does_not_train_its_epochs_again(folders):
    _, resumed = folders
    _, outcome = resumed["killed"]
    assert "epoch 1/8" not in outcome.stdout
    assert "epoch 8/8" in outcome.stdout


def test_a_finished_run_is_left_alone(folders, offramp):
    unbroken, _ = folders
    before = (unbroken / "model.safetensors").read_bytes()
    outcome = offramp(*TRAIN, *SETTINGS, "--out", unbroken, "--resume")
    assert outcome.code == 0, outcome.stderr
    assert "already" in outcome.stdout
    assert (unbroken / "model.safetensors").read_bytes() == before


def plateau(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "monitor": "train_loss"},
    }


@pytest.mark.parametrize("optimizer", [None, plateau])
def test_fit_resumes_bit_equal_with_dropout(tmp_path, optimizer):
    class StopInThirdEpoch(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.current_epoch == 2:
                raise RuntimeError("the power went out")

    def train(folder, **options):
        torch.manual_seed(0)
        stage = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.5))
        network = offramp_library.MultiExitNetwork([stage], [nn.Linear(32, 3)])
        data = TensorDataset(torch.randn(128, 4), torch.randint(3, (128,)))
        config = offramp_library.FitConfig(epochs=4, batch_size=16, device="cpu")
        task = offramp_library.make_task(network, config, optimizer=optimizer)
        offramp_library.fit(task, data, folder=folder, **options)
        return network.state_dict()

    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
    expected = train(tmp_path / "unbroken")
    with pytest.raises(RuntimeError, match="power"):
        train(tmp_path / "broken", callbacks=[StopInThirdEpoch()])
    found = train(tmp_path / "broken", resume=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_resume_without_a_run_starts_one(workplace, offramp):
    outcome = offramp("train", "--epochs", 1, "--set", "widths=8,8", "--out", "new", "--resume")
    assert outcome.code == 0, outcome.stderr
    assert len(metrics_lines(workplace / "new")) == 1


def test_interrupted_training_says_so_and_fails(tmp_path, start_offramp, finish_offramp):
    process = start_offramp(*TRAIN, *SETTINGS, "--epochs", 500, "--out", tmp_path / "run")
    wait_for_epochs(process, tmp_path / "run", epochs=1)
    process.send_signal(signal.SIGTERM)
    outcome = finish_offramp(process)
    assert outcome.code == 130
    assert outcome.stderr.splitlines()[-1] == (
        "offramp: interrupted; training goes on with --resume"
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()
