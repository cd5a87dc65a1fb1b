"""Training over two CPU processes."""

import json
import multiprocessing

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ddp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import offramp as off
from offramp.training.config import GateConfig
from offramp.zoo.skipnet import skipnet


@pytest.fixture
def _imported_once(monkeypatch):
    """Processes that part from one which has imported Lightning, as that takes ten seconds.

    What they train still comes by pickle. Those that start from nothing are in ``distributed``.
    """
    launcher = ddp._MultiProcessingLauncher
    multiprocessing.set_forkserver_preload(["offramp.training.fit"])
    monkeypatch.setattr(
        ddp,
        "_MultiProcessingLauncher",
        lambda strategy, start_method: launcher(strategy, {"spawn": "forkserver"}[start_method]),
    )


@pytest.fixture(scope="module")
def distributed(tmp_path_factory, start_offramp, finish_offramp):
    folder = tmp_path_factory.mktemp("distributed") / "run"
    settings = ("devices=2", "widths=24,64,64", "augment=false", "batch_size=8")
    options = [f"--set={setting}" for setting in settings]
    process = start_offramp("train", "digits-mlp", "--epochs", 2, *options, "--out", folder)
    outcome = finish_offramp(process)
    assert outcome.code == 0, outcome.stderr
    return folder, outcome


def test_two_processes_leave_one_line_an_epoch(distributed):
    folder, outcome = distributed
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[1]["train_loss"] < records[0]["train_loss"]
    assert outcome.stdout.count("epoch 2/2") == 1


def test_two_processes_report_the_accuracy_that_the_saved_weights_have(distributed, offramp):
    folder, _ = distributed
    reported = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    offramp("calibrate", folder, "--thresholds", "inf,inf")
    outcome = offramp("evaluate", folder, "--split", "calibration", "--json", "-")
    measured = [row["accuracy"] for row in json.loads(outcome.stdout)["exits"]]
    assert reported["exit_accuracy"] == pytest.approx(measured)
    assert all(accuracy > 0.6 for accuracy in measured)


@pytest.mark.usefixtures("_imported_once")
def test_two_processes_train_gates_that_settle(tmp_path):
    """In the last epoch no gate gets a gradient, which processes that wait for all would refuse."""
    network = skipnet(in_channels=1, widths=(4,), blocks=(3,), num_classes=3)
    before = [parameter.clone() for parameter in network.parameters()]
    data = TensorDataset(torch.randn(16, 1, 6, 6), torch.arange(16) % 3)
    gates = GateConfig(reward_epochs=1, settled_epochs=1)
    config = off.FitConfig(epochs=2, batch_size=4, devices=2, device="cpu", gates=gates)
    off.fit(network, data, config=config)
    moved = [not torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True)]
    assert all(moved)


class Net(nn.Module):
    """A layer to spare, a BatchNorm, and functions between."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.spare = nn.Linear(8, 3)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


class FirstProcessAsks(Callback):
    """As people write it: only one process reads the figures, and saves."""

    def on_train_epoch_end(self, trainer, module):
        if trainer.is_global_zero:
            assert trainer.callback_metrics["train_loss"] > 0
        trainer.strategy.barrier()


@pytest.mark.usefixtures("_imported_once")
def test_two_processes_share_out_a_loader_and_report_all_samples(tmp_path):
    """Unused parameters, a last batch of one in each process, and callbacks that go by val_loss."""
    network = off.add_exits(Net(), at=["norm"], num_classes=3, example=torch.randn(2, 8))
    inputs, others = torch.randn(66, 8), torch.randn(33, 8)
    train = DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), 16, shuffle=True)
    held_out = DataLoader(TensorDataset(others, others[:, :3].argmax(1)), 8)
    keep = ModelCheckpoint(tmp_path, monitor="val_loss")
    callbacks = [FirstProcessAsks(), keep]
    config = off.FitConfig(epochs=2, devices=2, device="cpu", learning_rate=0.03)
    history = off.fit(network, train, None, config, validation=held_out, callbacks=callbacks)
    correct_KN = off.collect(network, held_out).correct_KN
    assert history[-1]["exit_accuracy"] == pytest.approx(correct_KN.double().mean(1).tolist())
    assert float(keep.best_model_score) == pytest.approx(min(e["val_loss"] for e in history))


def test_what_cannot_be_sent_to_a_process_is_named(network):
    task = off.make_task(
        network,
        off.FitConfig(devices=2, device="cpu"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    with pytest.raises(off.InvalidArgumentError, match=r"by pickle.*lambda.*top of a module"):
        off.fit(task, TensorDataset(torch.randn(16, 6), torch.arange(16) % 4))


@pytest.mark.usefixtures("_imported_once")
def test_error_in_a_process_is_one_line(tmp_path, offramp, assert_one_line):
    settings = ("--set", "devices=2", "--set", "learning_rate=1e30", "--set", "optimizer=sgd")
    outcome = offramp("train", "--epochs", 5, *settings, "--out", tmp_path / "run")
    assert outcome.code == 2
    said_last = outcome.stderr.splitlines(keepends=True)[-1]  # Lightning reports the processes
    assert_one_line(said_last, ("diverged", "learning_rate"))
    assert "Traceback" not in outcome.stderr
