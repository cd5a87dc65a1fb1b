"""The library on a user's own data and network: fit, calibrate, run, save, load."""

from dataclasses import dataclass, replace

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import offramp as off

NUM_CLASSES = 4
CONFIG = off.FitConfig(epochs=4, batch_size=32, learning_rate=0.02, device="cpu")


def blobs(num_samples, *, seed):
    """Points around four well separated centres, some of them far out."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    centres = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
    noise = torch.randn(num_samples, 2, generator=generator)
    return TensorDataset(centres[labels] + 0.7 * noise, labels)


def build_network(width=16):
    torch.manual_seed(0)
    stages = [
        nn.Sequential(nn.Linear(2, width), nn.ReLU()),
        nn.Sequential(nn.Linear(width, width), nn.ReLU()),
    ]
    return off.MultiExitNetwork(stages, [nn.Linear(width, NUM_CLASSES) for _ in stages])


def accuracy(network, dataset):
    inputs, labels = dataset.tensors
    with torch.no_grad():
        return [float((logits.argmax(-1) == labels).float().mean()) for logits in network(inputs)]


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained():
    network = build_network()
    off.fit(network, blobs(256, seed=0), config=CONFIG)
    return network


@pytest.mark.parametrize("calibration", [None, blobs(64, seed=1)], ids=["alone", "calibration"])
@pytest.mark.parametrize(
    "wrap",
    [lambda data: data, lambda data: DataLoader(data, batch_size=32)],
    ids=["dataset", "loader"],
)
def test_fit_takes_a_dataset_or_a_loader_and_writes_nothing(empty_folder, wrap, calibration):
    network = build_network()
    held_out = calibration if calibration is None else wrap(calibration)
    off.fit(network, wrap(blobs(256, seed=0)), held_out, CONFIG)
    assert min(accuracy(network, blobs(256, seed=2))) > 0.9
    assert not network.training
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("regime", [{}, {"gradient_equilibrium": True}], ids=["joint", "balanced"])
def test_fit_takes_a_network_of_several_inputs(regime):
    class Joined(nn.Module):
        def __init__(self, stage):
            super().__init__()
            self.stage = stage

        def forward(self, x, y):
            return self.stage(torch.cat([x, y], 1))

    class Pairs(torch.utils.data.Dataset):
        """Blobs whose two coordinates come as two inputs."""

        def __init__(self, seed):
            self.points, self.labels = blobs(256, seed=seed).tensors

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, i):
            return (self.points[i, :1], self.points[i, 1:]), self.labels[i]

    network = build_network()
    network.stages[0] = Joined(network.stages[0])
    off.fit(network, Pairs(0), Pairs(1), replace(CONFIG, **regime))
    held_out = DataLoader(Pairs(2), batch_size=64)
    assert off.collect(network, held_out).correct_KN.double().mean(1).min() > 0.9


def test_fit_repeats_itself_with_the_same_seed():
    runs = []
    for _ in range(2):
        network = build_network()
        off.fit(network, blobs(64, seed=0), config=CONFIG)
        runs.append(torch.cat([parameter.flatten() for parameter in network.parameters()]))
    assert torch.equal(*runs)


def test_fit_balances_the_classes_of_a_users_data():
    inputs, labels = blobs(512, seed=0).tensors
    rare = TensorDataset(
        *(tensor[(labels > 0) | (inputs[:, 0] > 3.4)] for tensor in (inputs, labels))
    )
    seen = []
    network = build_network()
    network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    off.fit(network, rare, config=off.FitConfig(epochs=4, class_balance="sampling", device="cpu"))
    drawn = torch.cat(seen)
    in_rare_corner = ((drawn[:, 0] > 3.4) & (drawn[:, 1] > 0)).float().mean()
    assert (rare.tensors[1] == 0).float().mean() < 0.05
    assert in_rare_corner > 0.15


@pytest.mark.parametrize("wrong", [NUM_CLASSES, -1])
@pytest.mark.parametrize("where", ["train", "calibration"])
def test_labels_out_of_range_are_named(wrong, where):
    inputs, labels = blobs(32, seed=0).tensors
    labels[5] = wrong
    sets = {"train": blobs(32, seed=1), "calibration": blobs(32, seed=1)}
    sets[where] = TensorDataset(inputs, labels)
    with pytest.raises(off.DataError, match=rf"\[0, 3\].*Got {wrong}"):
        off.fit(build_network(), **sets, config=CONFIG)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (off.FitConfig(loss_weights=(1.0,), device="cpu"), "loss_weights.* 2 .*Got 1"),
        (off.FitConfig(class_balance="sampling", device="cpu"), "class_balance.*Got a DataLoader"),
    ],
)
def test_fit_refuses_what_it_cannot_do(config, message):
    with pytest.raises(off.InvalidArgumentError, match=message):
        off.fit(build_network(), DataLoader(blobs(32, seed=0)), config=config)


def test_fit_calls_the_users_callbacks():
    class CountEpochs(Callback):
        epochs = 0

        def on_train_epoch_end(self, trainer, pl_module):
            self.epochs += 1

    counter = CountEpochs()
    off.fit(build_network(), blobs(64, seed=0), config=CONFIG, callbacks=[counter])
    assert counter.epochs == CONFIG.epochs


def test_fit_in_a_folder_leaves_checkpoint_metrics_and_logs(empty_folder):
    off.fit(build_network(), blobs(64, seed=0), config=CONFIG, folder=empty_folder)
    assert {path.name for path in empty_folder.iterdir()} == {"last.ckpt", "metrics.jsonl", "logs"}
    assert list(empty_folder.glob("logs/csv/*/metrics.csv"))
    assert list(empty_folder.glob("logs/tensorboard/*/events.*"))


def test_folder_by_a_relative_path_outlives_a_change_of_folder(empty_folder, monkeypatch):
    class MovesAway(Callback):
        def on_train_start(self, trainer, pl_module):
            monkeypatch.chdir("elsewhere")

    made, elsewhere = empty_folder / "made", empty_folder / "elsewhere"
    made.mkdir()
    elsewhere.mkdir()
    data = blobs(64, seed=0)
    off.fit(build_network(), data, config=CONFIG, folder="made", callbacks=[MovesAway()])
    assert {path.name for path in made.iterdir()} == {"last.ckpt", "metrics.jsonl", "logs"}
    assert not list(elsewhere.iterdir())


def test_calibrated_network_spends_less_on_easy_samples(trained):
    logits = off.collect(trained, DataLoader(blobs(256, seed=1), batch_size=64))
    chosen = off.calibrate(logits, max_drop=0.01)
    held_out = DataLoader(blobs(256, seed=2), batch_size=64)
    evaluation = off.evaluate(
        off.AdaptiveRunner(trained, chosen.policy), held_out, off.collect(trained, held_out)
    )
    assert evaluation.accuracy > 0.9
    assert evaluation.mean_macs < evaluation.plain_macs


@pytest.mark.parametrize(
    "policy",
    [
        off.ThresholdPolicy((0.5,), rule="margin"),
        off.PatiencePolicy(2, 2),
        off.never_leave(2),
        None,
    ],
    ids=str,
)
def test_a_saved_network_answers_as_before(empty_folder, trained, policy):
    off.save("own", trained, policy=policy, class_names=("a", "b", "c", "d"))
    run = off.load("own", network=build_network())
    inputs, _ = blobs(32, seed=3).tensors
    with torch.no_grad():
        pairs = zip(run.network(inputs), trained(inputs), strict=True)
        assert all(torch.equal(found, expected) for found, expected in pairs)
    assert run.policy == policy
    assert run.class_names == ("a", "b", "c", "d")


def test_load_asks_for_the_network(empty_folder, trained):
    off.save("own", trained)
    with pytest.raises(off.InvalidArgumentError, match=r"load\(folder, network=...\)"):
        off.load("own")


def test_load_refuses_another_network_and_leaves_it_as_it_was(empty_folder, trained):
    off.save("own", trained)
    other = build_network(width=8)
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(off.ArtifactError, match="another network"):
        off.load("own", network=other)
    assert all(map(torch.equal, before, other.parameters()))


def test_save_does_not_write_over_a_run(empty_folder, trained):
    off.save("own", trained)
    with pytest.raises(off.ArtifactError, match="exists"):
        off.save("own", trained)


def test_save_of_a_policy_it_does_not_know_writes_nothing(empty_folder, trained):
    @dataclass
    class Own(off.Policy):
        num_exits: int = 2

        def decide(self, exit_index, output, state, setting):
            raise NotImplementedError

    with pytest.raises(off.InvalidArgumentError, match="Own"):
        off.save("own", trained, policy=Own())
    assert not (empty_folder / "own").exists()


def test_commands_say_that_an_own_network_has_no_recipe(empty_folder, trained, refuses):
    off.save("own", trained, policy=off.never_leave(2))
    refuses("evaluate", "own", words=("own", "network of your own"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_train_and_run_on_a_gpu():
    network = build_network()
    config = off.FitConfig(epochs=4, batch_size=32, learning_rate=0.02, device="cuda")
    off.fit(network, blobs(256, seed=0), blobs(64, seed=1), config)
    on_cpu = off.AdaptiveRunner(network.cpu(), off.ThresholdPolicy((0.5,)))
    inputs, _ = blobs(256, seed=2).tensors
    expected = on_cpu.run(inputs)
    network.cuda()
    found = off.AdaptiveRunner(network, on_cpu.policy).run(inputs.cuda())
    moved = (found.exit_index.cpu() != expected.exit_index).sum()
    assert moved <= 1
    assert found.output.is_cuda
    assert min(accuracy(network.cpu(), blobs(256, seed=2))) > 0.9
