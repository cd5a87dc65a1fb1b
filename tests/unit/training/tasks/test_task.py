import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from offramp.artifacts import SCHEMA_VERSION
from offramp.data.label_range import check_labels
from offramp.errors import ArtifactError, DataError, InvalidArgumentError, TrainingDivergedError
from offramp.model.multi_exit import MultiExitNetwork
from offramp.training.config import FitConfig
from offramp.training.fit import fit
from offramp.training.last_checkpoint import check_checkpoint
from offramp.training.tasks.exits import MultiExitTask

PAIRS = [(torch.zeros(6), 0), (torch.ones(6), 1)]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("optimizer", "lion"),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("loss_weights", (1.0, -1.0)),
        ("loss_weights", (1.0, math.nan)),
        ("class_balance", "loss"),
        ("precision", "float16"),
        ("weight_decay", -0.1),
        ("backbone_epochs", -1),
        ("backbone_epochs", 10),
        ("ramp_epochs", -1),
        ("ramp_epochs", 11),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("distillation", 1.1),
        ("device", "tpu"),
        ("devices", 0),
        ("seed", -1),
    ],
)
def test_setting_out_of_range_is_refused_by_name(setting, value):
    with pytest.raises(InvalidArgumentError, match=f"The '{setting}' parameter must be .* Got "):
        FitConfig(**{setting: value})


def test_settings_at_the_edge_of_their_range_are_taken():
    FitConfig(epochs=1, batch_size=1, weight_decay=0, label_smoothing=0, distillation=1)
    FitConfig(epochs=3, backbone_epochs=2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"freeze_backbone": True, "backbone_epochs": 1}, "freeze_backbone"),
        ({"freeze_backbone": True, "gradient_equilibrium": True}, "freeze_backbone"),
        ({"gradient_equilibrium": True, "detach": True}, "gradient_equilibrium"),
        ({"epochs": 3, "ramp_epochs": 4}, "ramp_epochs"),
        ({"epochs": 3, "backbone_epochs": 1, "ramp_epochs": 3}, "ramp_epochs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, named):
    with pytest.raises(InvalidArgumentError, match=f"The '{named}' parameter must be .* Got "):
        FitConfig(**settings)


def test_settings_that_go_together_are_taken():
    FitConfig(freeze_backbone=True, detach=True, distillation=0.5, ramp_epochs=10)
    FitConfig(gradient_equilibrium=True, backbone_epochs=2, ramp_epochs=8, distillation=0.5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FitConfig(), [(1, 1, 1)] * 3),
        (FitConfig(loss_weights=(0.3, 0.5, 2)), [(0.3, 0.5, 2)] * 3),
        (FitConfig(loss_weights=(0.3, 0.5, 2), backbone_epochs=2), [(0, 0, 2)] * 2),
        (FitConfig(backbone_epochs=1), [(0, 0, 1), (1, 1, 1), (1, 1, 1)]),
        (FitConfig(ramp_epochs=1), [(0.5, 0.5, 1), (1, 1, 1)]),
        (FitConfig(backbone_epochs=1, ramp_epochs=1), [(0, 0, 1), (0.5, 0.5, 1), (1, 1, 1)]),
    ],
)
def test_loss_weights_by_epoch(network, config, expected):
    task = MultiExitTask(network, config)
    assert [task.loss_weights(epoch) for epoch in range(len(expected))] == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)],
)
def test_weight_decay_spares_biases_and_norms(name, kind):
    stage = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    network = MultiExitNetwork([stage], [nn.Linear(2, 3)])
    stage[0].bias.requires_grad = False
    task = MultiExitTask(network, FitConfig(optimizer=name, weight_decay=0.3, learning_rate=0.1))
    optimizer = task.configure_optimizers()["optimizer"]
    assert type(optimizer) is kind
    decay_of = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay_of == {
        id(stage[0].weight): 0.3,
        id(network.exits[0].weight): 0.3,
        id(stage[1].weight): 0,
        id(stage[1].bias): 0,
        id(network.exits[0].bias): 0,
    }


def test_learning_rate_falls_by_a_cosine_to_zero(network):
    task = MultiExitTask(network, FitConfig(epochs=4, learning_rate=0.2))
    parts = task.configure_optimizers()
    optimizer, schedule = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(5)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(("labels", "wrong"), [([0, 4], 4), ([-1, 3], -1), ([-1, 9], -1)])
def test_labels_without_an_output_are_refused(labels, wrong):
    with pytest.raises(DataError, match=rf"in \[0, 3\].* Got {wrong}"):
        check_labels(torch.tensor(labels), num_classes=4)


def test_labels_from_first_to_last_class_are_taken():
    check_labels(torch.tensor([3, 0]), num_classes=4)
    with pytest.raises(DataError, match="pixels without a class, mark them 255"):
        check_labels(torch.tensor([[[0, -100]]]), num_classes=4)


# What fit refuses before it starts


def test_one_loss_weight_for_each_exit(network):
    with pytest.raises(InvalidArgumentError, match=r"3 numbers, one per exit. Got 2"):
        fit(network, PAIRS, config=FitConfig(loss_weights=(1, 1)))


def test_class_balance_needs_a_data_set(network):
    loader = torch.utils.data.DataLoader(PAIRS)
    with pytest.raises(InvalidArgumentError, match="Got a DataLoader"):
        fit(network, loader, config=FitConfig(class_balance="sampling", device="cpu"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_that_of_the_features_not_of_the_weights(network, precision):
    seen = set()
    network.stages[0].register_forward_hook(lambda *given: seen.add(given[-1].dtype))
    data = TensorDataset(torch.randn(40, 6), torch.arange(40) % 4)
    weight = next(network.parameters())
    before = weight.detach().clone()
    fit(network, data, config=FitConfig(epochs=2, precision=precision, device="cpu"))
    assert seen == {getattr(torch, precision)}
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, before)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader'")
def test_training_that_diverges_ends_in_an_error(network):
    torch.nn.init.constant_(network.exits[0].weight, math.inf)
    with pytest.raises(TrainingDivergedError, match="epoch 1: training has diverged"):
        fit(network, PAIRS, config=FitConfig(device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(network):
    with pytest.raises(InvalidArgumentError, match="Use the device cpu"):
        fit(network, PAIRS, config=FitConfig(device="cuda"))


# Checkpoints to resume from


@pytest.fixture
def checkpoint(network, tmp_path):
    path = tmp_path / "last.ckpt"
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"offramp_schema_version": SCHEMA_VERSION, "state_dict": state}, path)
    return path


def test_whole_checkpoint_of_the_network_is_taken(network, checkpoint):
    assert check_checkpoint(checkpoint, network) == checkpoint


def cut(path, content):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path, content):
    path.write_bytes(b"")


def replace_by_text(path, content):
    path.write_text("hello")


def drop_version(path, content):
    torch.save({"state_dict": content["state_dict"]}, path)


def drop_state(path, content):
    torch.save({**content, "state_dict": None}, path)


@pytest.mark.parametrize("damage", [cut, empty, replace_by_text, drop_version, drop_state])
def test_damaged_checkpoint_is_refused(network, checkpoint, damage):
    damage(checkpoint, torch.load(checkpoint, weights_only=True))
    with pytest.raises(ArtifactError, match="is damaged or not Offramp's"):
        check_checkpoint(checkpoint, network)


def test_checkpoint_of_a_newer_schema_is_refused(network, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "offramp_schema_version": SCHEMA_VERSION + 1}, checkpoint)
    with pytest.raises(ArtifactError, match="pip install --upgrade offramp"):
        check_checkpoint(checkpoint, network)


def test_checkpoint_of_another_network_is_refused(checkpoint):
    other = MultiExitNetwork([nn.Linear(6, 5)], [nn.Linear(5, 4)])
    with pytest.raises(ArtifactError, match="of another network"):
        check_checkpoint(checkpoint, other)


def test_config_is_frozen():
    config = FitConfig()
    assert replace(config, epochs=3).epochs == 3
    with pytest.raises(AttributeError):
        config.epochs = 3


def test_nothing_to_train_on_is_refused(network):
    with pytest.raises(DataError, match="at least one sample"):
        fit(network, [], config=FitConfig(device="cpu"))
