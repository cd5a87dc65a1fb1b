"""``fit`` as Lightning users know it: callbacks, loggers, own optimizer, loss, metrics, Trainer."""

import json
import math
import re
import signal
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import offramp as off
from offramp.errors import ArtifactError, DataError, InvalidArgumentError, TrainingDivergedError

INPUTS = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
TRAIN = TensorDataset(INPUTS, INPUTS[:, :3].argmax(1))
OTHERS = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
HELD_OUT = TensorDataset(OTHERS, OTHERS[:, :3].argmax(1))
Config = partial(off.FitConfig, epochs=2, batch_size=16, device="cpu")


@pytest.fixture
def make_network():
    def make(*, norm=nn.Identity):
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(8, 16), norm(), nn.ReLU(), nn.Linear(16, 3))
        return off.add_exits(backbone, at=["2"], num_classes=3, example=torch.randn(2, 8))

    return make


def weights_of(network):
    return torch.cat([tensor.flatten().float() for tensor in network.state_dict().values()])


def own_trainer(**options):
    quiet = ("enable_progress_bar", "enable_checkpointing", "enable_model_summary", "logger")
    return Trainer(accelerator="cpu", **dict.fromkeys(quiet, False), **options)


# What it says


def test_a_line_an_epoch_and_a_history(make_network, capsys):
    history = off.fit(make_network(), TRAIN, HELD_OUT, Config())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert f"loss {history[1]['train_loss']:.4f}" in lines[1]
    table = str(history).splitlines()
    assert len(table) == 3
    assert table[0].split()[:4] == ["epoch", "train_loss", "val_loss", "accuracy_exit_0"]
    assert table[2].split()[2] == f"{history[1]['val_loss']:.4f}"


def test_progress_false_is_silent(make_network, capsys):
    off.fit(make_network(), TRAIN, config=Config(), progress=False)
    assert capsys.readouterr() == ("", "")


def test_reported_figures_are_those_of_the_network(make_network):
    network = make_network()
    history = off.fit(network, TRAIN, None, Config(loss_weights=(0.5, 1.0)), validation=HELD_OUT)
    inputs, labels = HELD_OUT.tensors
    first, last = network(inputs)
    expected = 0.5 * F.cross_entropy(first, labels) + F.cross_entropy(last, labels)
    assert history[-1]["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
    accuracies = [(logits.argmax(1) == labels).float().mean().item() for logits in (first, last)]
    assert history[-1]["exit_accuracy"] == pytest.approx(accuracies)


def test_history_of_a_resumed_run_holds_every_epoch(make_network, tmp_path):
    task = partial(off.make_task, make_network(), optimizer=partial(torch.optim.SGD, lr=0.1))
    off.fit(task(Config(epochs=1)), TRAIN, folder=tmp_path)
    history = off.fit(task(Config(epochs=3)), TRAIN, folder=tmp_path, resume=True)
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


# Callbacks and loggers


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_a_bar_of_the_users_own_replaces_the_lines(make_network, bar, capsys):
    off.fit(make_network(), TRAIN, config=Config(), callbacks=bar())
    assert "epoch 1/2" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "callback",
    [
        LearningRateMonitor,
        partial(GradientAccumulationScheduler, {0: 2}),
        partial(StochasticWeightAveraging, swa_lrs=0.01),
        partial(EarlyStopping, "train_loss"),
    ],
)
def test_callbacks_that_people_pass(make_network, callback):
    history = off.fit(make_network(norm=partial(nn.BatchNorm1d, 16)), TRAIN, None, Config(),
                      callbacks=[callback()])  # fmt: skip
    assert len(history) >= 2


def test_model_checkpoint_keeps_the_best_epoch(make_network, tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val_loss")
    network = make_network()
    history = off.fit(
        network, TRAIN, None, Config(epochs=3, learning_rate=1.0, validation_share=0.25),
        callbacks=[keep],
    )  # fmt: skip
    best = min(epoch["val_loss"] for epoch in history)
    assert float(keep.best_model_score) == pytest.approx(best)
    kept = torch.load(keep.best_model_path, weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("network."): t for name, t in kept.items()})


def test_early_stopping_stops(make_network):
    stop = EarlyStopping("val_loss", patience=0, min_delta=100.0)
    history = off.fit(
        make_network(), TRAIN, None, Config(epochs=9), validation=HELD_OUT, callbacks=[stop]
    )
    assert len(history) == 2


def test_callbacks_that_log_are_in_the_history(make_network):
    class Log(Callback):
        def on_train_epoch_end(self, trainer, module):
            module.log("mine", 1.5)
            trainer.logger.log_metrics({"more": 2.0})

    history = off.fit(make_network(), TRAIN, config=Config(), callbacks=[Log()])
    assert history[0]["metrics"] == {"mine": 1.5}
    assert history.rows()[0]["mine"] == 1.5


def test_loggers_of_the_users_own(make_network, tmp_path):
    logger = CSVLogger(tmp_path, name="mine")
    off.fit(make_network(), TRAIN, None, Config(), validation=HELD_OUT, logger=[logger])
    assert "val_loss" in (tmp_path / "mine" / "version_0" / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"callbacks": [LearningRateMonitor]}, "'callbacks' .* make an instance"),
        ({"logger": "tensorboard"}, "'logger' .* Got builtins.str"),
        ({"callbacks": [ModelCheckpoint(monitor="val_loss")]}, "'val_loss', .* There is none"),
        ({"callbacks": [EarlyStopping("nope")]}, "`nope` which is not available"),
        ({"callbacks": [LearningRateMonitor()], "logger": False}, "no logger"),
        ({"callbacks": [TQDMProgressBar(), RichProgressBar()]}, "multiple progress bar"),
    ],
)
def test_what_callbacks_lack_is_said_in_a_line(make_network, options, said):
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        off.fit(make_network(), TRAIN, config=Config(), **options)
    assert "\n" not in str(caught.value)


# Validation data


def test_validation_part_is_cut_from_train_by_the_seed(make_network):
    seen = []

    class See(Callback):
        def on_validation_batch_end(self, trainer, module, outputs, batch, *_):
            seen.append(batch[0])

        def on_train_batch_end(self, trainer, module, outputs, batch, *_):
            seen_in_training.append(batch[0])

    parts = []
    for _ in range(2):
        seen, seen_in_training = [], []
        off.fit(make_network(), TRAIN, None, Config(epochs=1, validation_share=0.25),
                callbacks=[See()])  # fmt: skip
        parts.append(torch.cat(seen))
    assert torch.equal(*parts)
    both = torch.cat([parts[0], *seen_in_training])
    assert len(parts[0]) == 16
    assert torch.equal(both.sort(0).values, INPUTS.sort(0).values)


@pytest.mark.parametrize(
    ("train", "options"),
    [(TRAIN, {"validation": HELD_OUT}), (DataLoader(TRAIN, 16), {})],
)
def test_a_share_is_cut_from_a_data_set_alone(make_network, train, options):
    with pytest.raises(InvalidArgumentError, match="'validation_share' cuts"):
        off.fit(make_network(), train, None, Config(validation_share=0.2), **options)


# Optimizer, loss and metrics of the user's own


def plateau(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"},
    }


def test_own_optimizer_and_scheduler(make_network):
    task = off.make_task(make_network(), Config(epochs=3), optimizer=plateau)
    history = off.fit(task, TRAIN, validation=HELD_OUT, callbacks=[LearningRateMonitor()])
    rates = [epoch["metrics"]["lr-SGD"] for epoch in history]
    assert rates == pytest.approx([0.1, 0.01, 0.001])
    with pytest.raises(InvalidArgumentError, match="ReduceLROnPlateau goes by 'val_loss'"):
        off.fit(off.make_task(make_network(), Config(), optimizer=plateau), TRAIN)


def test_own_loss_and_metrics(make_network):
    def loss(logits, labels):
        return F.multi_margin_loss(logits, labels)

    network = make_network()
    metrics = {
        "f1": torchmetrics.F1Score("multiclass", num_classes=3, average="macro"),
        "margin": loss,
    }
    task = off.make_task(network, Config(), loss=loss, metrics=metrics)
    last = off.fit(task, TRAIN, validation=HELD_OUT)[-1]
    inputs, labels = HELD_OUT.tensors
    losses = [loss(logits, labels).item() for logits in network(inputs)]
    assert last["val_loss"] == pytest.approx(sum(losses), rel=1e-5)
    assert [last["metrics"][f"margin_exit_{k}"] for k in (0, 1)] == pytest.approx(losses, rel=1e-5)
    f1 = torchmetrics.functional.f1_score(
        network(inputs)[1], labels, "multiclass", num_classes=3, average="macro"
    )
    assert last["metrics"]["f1_exit_1"] == pytest.approx(f1.item())


def test_clipping_bounds_a_step(make_network):
    network = make_network()
    before = weights_of(network)
    task = off.make_task(
        network,
        Config(epochs=1, batch_size=64, gradient_clip_val=0.01),
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )
    off.fit(task, TRAIN)
    assert (weights_of(network) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "must be a scalar. Got one of shape"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)}, "must be a function"),
        ({"optimizer": lambda parameters: [1]}, "must return an optimizer"),
        ({"metrics": {"all": lambda logits, labels: labels}}, "all_exit_0|one number"),
        ({"loss": F.cross_entropy, "config": Config(label_smoothing=0.1)}, "'label_smoothing'"),
    ],
)
def test_wrong_parts_are_refused(make_network, options, said):
    options.setdefault("config", Config())
    if "metrics" in options:
        options["metrics"] = {
            "all": torchmetrics.Recall("multiclass", num_classes=3, average="none")
        }
    with pytest.raises(InvalidArgumentError, match=said):
        off.fit(off.make_task(make_network(), **options), TRAIN, validation=HELD_OUT)


# The task in a Trainer, and loops of the user's own


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*logging interval")
@pytest.mark.parametrize("freeze_backbone", [False, True])
def test_own_trainer_gives_the_weights_of_fit(make_network, freeze_backbone):
    config, loader = Config(freeze_backbone=freeze_backbone), DataLoader(TRAIN, 16)
    by_fit, by_hand = make_network(), make_network()
    off.fit(by_fit, loader, HELD_OUT, config)
    trainer = own_trainer(max_epochs=2)
    trainer.fit(off.MultiExitTask(by_hand, config), loader, DataLoader(HELD_OUT, 16))
    assert torch.equal(weights_of(by_fit), weights_of(by_hand))
    assert {"val_loss", "accuracy_exit_0", "accuracy_exit_1"} <= set(trainer.callback_metrics)
    assert all(parameter.requires_grad for parameter in by_hand.parameters())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_own_trainer_of_more_epochs_than_the_schedule(make_network):
    with pytest.raises(InvalidArgumentError, match=r"2 epochs .* max_epochs=3"):
        own_trainer(max_epochs=3).fit(off.make_task(make_network(), Config()), DataLoader(TRAIN))


def test_a_task_is_of_its_family(skip_network, halting_network):
    assert isinstance(off.make_task(skip_network), off.SkipTask)
    assert isinstance(off.make_task(halting_network), off.HaltingTask)
    with pytest.raises(InvalidArgumentError, match="MultiExitTask does not train this SkipNetwork"):
        off.MultiExitTask(skip_network)


def test_own_loss_trains_every_family(skip_network, halting_network):
    for network, side in ((skip_network, 16), (halting_network, 12)):
        data = TensorDataset(torch.randn(8, 3, side, side), torch.arange(8) % 5)
        task = off.make_task(network, Config(epochs=1), loss=F.multi_margin_loss)
        assert off.fit(task, data, data)[0]["val_loss"] > 0
    rewarded = Config(gates=off.GateConfig(reward_epochs=1))
    with pytest.raises(InvalidArgumentError, match="gates are rewarded by"):
        off.make_task(skip_network, rewarded, loss=F.multi_margin_loss)


def test_a_task_has_its_config(make_network):
    with pytest.raises(InvalidArgumentError, match="Give it to make_task alone"):
        off.fit(off.make_task(make_network(), Config()), TRAIN, config=Config(epochs=3))


def test_own_loop(make_network):
    """Ten lines of plain PyTorch, as the README shows them."""
    network, loader = make_network(), DataLoader(TRAIN, batch_size=16, shuffle=True)
    inputs, labels = TRAIN.tensors
    before = off.joint_loss(network(inputs), labels).item()

    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    network.train()
    for _ in range(20):
        for x, y in loader:
            logits = network(x)  # every exit's logits, the final exit last
            loss = off.joint_loss(logits, y, weights=(0.5, 1.0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()

    assert off.joint_loss(network(inputs), labels).item() < before / 2


# BatchNorm and batches of one sample


@pytest.mark.parametrize("data", [TRAIN, DataLoader(TRAIN, 21)])
def test_a_last_batch_of_one_sample_uses_running_statistics(make_network, data):
    network = make_network(norm=partial(nn.BatchNorm1d, 16))
    off.fit(network, data, config=Config(epochs=2, batch_size=21))
    norm = next(m for m in network.modules() if isinstance(m, nn.BatchNorm1d))
    assert norm.num_batches_tracked == 6  # three whole batches an epoch
    assert weights_of(network).isfinite().all()


@pytest.mark.parametrize("data", [TRAIN, DataLoader(TRAIN, 1), TensorDataset(*TRAIN[:1])])
def test_batches_of_one_sample_are_refused_where_there_is_a_batch_norm(make_network, data):
    network = make_network(norm=partial(nn.BatchNorm1d, 16))
    with pytest.raises(InvalidArgumentError, match="two samples or more"):
        off.fit(network, data, config=Config(batch_size=1))


# What is refused, and what an interruption leaves


def test_networks_that_cannot_be_trained(make_network):
    with pytest.raises(InvalidArgumentError, match="Got Linear: call add_exits"):
        off.fit(nn.Linear(8, 3), TRAIN)
    with pytest.raises(InvalidArgumentError, match="All of this network's are frozen"):
        off.fit(make_network().requires_grad_(False), TRAIN)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"epochs": "3"}, "'epochs' parameter must be an int. Got '3'"),
        ({"batch_size": 16.0}, "'batch_size' parameter must be an int. Got 16.0"),
        ({"learning_rate": None}, "'learning_rate' parameter must be a number. Got None"),
        ({"loss_weights": 1.0}, "'loss_weights' parameter must be a tuple of numbers"),
        ({"gates": {"alpha": 0.1}}, "'gates' parameter must be a GateConfig"),
    ],
)
def test_settings_are_of_their_kind(setting, said):
    with pytest.raises(InvalidArgumentError, match=re.escape(said)):
        off.FitConfig(**setting)


def test_what_is_no_config_and_no_folder(make_network, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"a FitConfig, such as .* Got dict"):
        off.fit(make_network(), TRAIN, config={"epochs": 3})
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match="Expected a folder to write to"):
        off.fit(make_network(), TRAIN, config=Config(), folder=tmp_path / "file")


def test_errors_of_python_speak_python(make_network):
    nothing = TensorDataset(INPUTS * math.nan, TRAIN.tensors[1])
    with pytest.raises(TrainingDivergedError, match="smaller learning_rate") as caught:
        off.fit(make_network(), nothing, config=Config())
    assert "--" not in str(caught.value)


def test_a_stream_of_samples_is_to_come_in_a_loader(make_network):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TRAIN)

    with pytest.raises(DataError, match="wrap it in a DataLoader"):
        off.fit(make_network(), Stream(), config=Config())
    assert len(off.fit(make_network(), DataLoader(Stream(), 16), config=Config())) == 2


def test_an_interruption_leaves_a_network_that_runs_and_can_be_interrupted_again(make_network):
    class Interrupt(Callback):
        def on_train_batch_end(self, *_):
            raise KeyboardInterrupt

    network, before = make_network(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        off.fit(network, TRAIN, config=Config(freeze_backbone=True), callbacks=[Interrupt()])
    assert not network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert signal.getsignal(signal.SIGINT) is before


# Resuming with other settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "sgd"}, "optimizer='adamw', and this training has optimizer='sgd'"),
        ({"epochs": 5}, "epochs=2, and this training has epochs=5"),
        ({"epochs": 1}, "epochs=2, and this training has epochs=1"),
        ({"warmup_epochs": 1}, "warmup_epochs=0"),
        ({"loss_weights": (0.5, 1.0)}, "loss_weights=None"),
        ({"learning_rate": 0.1}, "learning_rate=0.003"),
    ],
)
def test_resuming_with_other_settings_names_the_first(make_network, tmp_path, changes, said):
    off.fit(make_network(), TRAIN, config=Config(), folder=tmp_path)
    with pytest.raises(ArtifactError, match=said):
        off.fit(make_network(), TRAIN, config=Config(**changes), folder=tmp_path, resume=True)


def test_resuming_with_another_optimizer_of_the_users_own(make_network, tmp_path):
    def task(kind, **changes):
        maker = partial(kind, lr=0.1)
        return off.make_task(make_network(), Config(**changes), optimizer=maker)

    off.fit(task(torch.optim.SGD), TRAIN, folder=tmp_path)
    with pytest.raises(ArtifactError, match=r"optimizer='SGD', and this training has .*'RMSprop'"):
        off.fit(task(torch.optim.RMSprop), TRAIN, folder=tmp_path, resume=True)
    with pytest.raises(ArtifactError, match="has 2 epochs done, more than the 1"):
        off.fit(task(torch.optim.SGD, epochs=1), TRAIN, folder=tmp_path, resume=True)
    with pytest.raises(ArtifactError, match=r"optimizer='SGD', and this training has .*'adamw'"):
        off.fit(make_network(), TRAIN, config=Config(), folder=tmp_path, resume=True)


def test_resuming_with_other_parameters_to_train(make_network, tmp_path):
    off.fit(make_network(), TRAIN, config=Config(), folder=tmp_path)
    network = make_network()
    network.stages.requires_grad_(False)
    with pytest.raises(ArtifactError, match="or of other parameters to train"):
        off.fit(network, TRAIN, config=Config(), folder=tmp_path, resume=True)


def test_a_checkpoint_of_an_older_version_goes_on_unless_the_optimizer_differs(
    make_network, tmp_path
):
    off.fit(make_network(), TRAIN, config=Config(), folder=tmp_path)
    path = tmp_path / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del content["offramp_settings"]
    torch.save(content, path)
    with pytest.raises(ArtifactError, match="another optimizer than this SGD"):
        off.fit(make_network(), TRAIN, config=Config(optimizer="sgd"), folder=tmp_path, resume=True)
    off.fit(make_network(), TRAIN, config=Config(), folder=tmp_path, resume=True)


# Samples that chose the checkpoint


def test_no_guarantee_rests_on_samples_that_chose_the_checkpoint(make_network, tmp_path):
    keep = ModelCheckpoint(tmp_path / "kept", monitor="accuracy_exit_1", mode="max")
    folder, network = tmp_path / "run", make_network()
    folder.mkdir()
    off.fit(network, TRAIN, HELD_OUT, Config(), callbacks=[keep], folder=folder)
    said = json.loads((folder / "checkpoint_choice.json").read_text())
    assert said["by"] == "ModelCheckpoint by 'accuracy_exit_1'"
    assert len(said["samples"]) == 20
    off.save(tmp_path / "saved", network)
    loaded = off.load(tmp_path / "saved", make_network()).network
    for which in (network, loaded):
        logits = off.collect(which, DataLoader(HELD_OUT, 7, shuffle=True))
        with pytest.raises(off.InSampleError, match="ModelCheckpoint by 'accuracy_exit_1'"):
            off.calibrate_with_guarantee(logits, max_risk=0.5, risk="error", guarantee=0.5)
        fresh = off.collect(which, DataLoader(TensorDataset(OTHERS + 1, HELD_OUT.tensors[1]), 7))
        assert fresh.checkpoint_chosen_by == ""


@pytest.mark.parametrize(
    ("callbacks", "options"),
    [
        ([], {}),
        ([ModelCheckpoint(monitor="train_loss", save_top_k=0)], {}),
        ([EarlyStopping("val_loss")], {"validation": TensorDataset(*TRAIN[:9])}),
    ],
)
def test_samples_that_choose_nothing_may_promise(make_network, tmp_path, callbacks, options):
    network = make_network()
    off.fit(network, TRAIN, HELD_OUT, Config(), callbacks=callbacks, folder=tmp_path, **options)
    assert not (tmp_path / "checkpoint_choice.json").exists()
    assert off.collect(network, DataLoader(HELD_OUT, 7)).checkpoint_chosen_by == ""
