"""Training a network that skips blocks, against steps written by hand."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import offramp as off
from offramp.routing.skip import add_gates
from offramp.training.config import GateConfig
from offramp.training.tasks.reinforce import reinforce_loss, returns_to_go, skip_rewards
from offramp.training.tasks.skip import SkipTask
from offramp.zoo.resnet import resnet


def small_network():
    torch.manual_seed(0)
    backbone = resnet(in_channels=1, widths=(8, 16), blocks=(2, 2), exits_after=(), num_classes=3)
    return add_gates(backbone)


def stripes(num_samples, *, seed):
    """Images with a bright row at one of three heights: the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num_samples,), generator=generator)
    images = 0.5 * torch.randn(num_samples, 1, 9, 9, generator=generator)
    images[torch.arange(num_samples), :, 3 * labels + 1] += 2
    return TensorDataset(images, labels)


BATCH = stripes(12, seed=0).tensors


def loss_in_epoch(monkeypatch, network, config, epoch):
    monkeypatch.setattr(SkipTask, "current_epoch", epoch)
    torch.manual_seed(7)
    return SkipTask(network, config).loss((BATCH[0],), BATCH[1])


def gradients(network, loss):
    """Of every parameter; zero where the loss does not depend on it."""
    parameters = list(network.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def pass_by_hand(network, images, act):
    """A loop over the blocks: logits, and the probability and action of each gate."""
    x, state, probabilities, actions = network.stem(images), (), [], []
    for index, block in enumerate(network.blocks):
        score, state = network.gates(index, x, state)
        probabilities.append(torch.sigmoid(score))
        actions.append(act(probabilities[-1]))
        a = actions[-1].reshape(-1, 1, 1, 1)
        around = x if x.shape == block(x).shape else torch.relu(block.shortcut(x))
        x = a * block(x) + (1 - a) * around
    return network.head(x), torch.stack(probabilities, 1), torch.stack(actions, 1)


def test_supervised_epochs_train_straight_through(monkeypatch):
    network = small_network().eval()  # so that a block that is run twice counts once
    config = off.FitConfig(epochs=3, gates=GateConfig(reward_epochs=1), label_smoothing=0.1)
    found = gradients(network, loss_in_epoch(monkeypatch, network, config, epoch=1))

    def hard_with_soft_slope(p):
        return torch.bernoulli(p.detach()).sub(p).detach() + p

    torch.manual_seed(7)  # as in loss_in_epoch
    logits, _, _ = pass_by_hand(network, BATCH[0], hard_with_soft_slope)
    expected = gradients(network, F.cross_entropy(logits, BATCH[1], label_smoothing=0.1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert any(g.abs().sum() > 0 for g in gradients_of_gates(network, found))


def gradients_of_gates(network, found):
    ids = {id(p) for p in network.gates.parameters()}
    return [g for p, g in zip(network.parameters(), found, strict=True) if id(p) in ids]


@pytest.mark.parametrize("reward", ["blocks", "macs"])
@pytest.mark.parametrize("supervised", [True, False])
def test_last_epochs_train_by_labels_and_reward(monkeypatch, reward, supervised):
    network = small_network().eval()
    gates = GateConfig(
        reward_epochs=1, alpha=0.7, reward=reward, policy_weight=0.4, supervised=supervised
    )
    config = off.FitConfig(epochs=3, gates=gates)
    found = gradients(network, loss_in_epoch(monkeypatch, network, config, epoch=2))

    torch.manual_seed(7)
    logits, p, actions = pass_by_hand(network, BATCH[0], lambda p: torch.bernoulli(p.detach()))
    cross_entropy = F.cross_entropy(logits, BATCH[1], reduction="none")
    weights = network.costs(BATCH[0]).block_macs if reward == "macs" else None
    returned = returns_to_go(skip_rewards(actions, 0.7, weights), -cross_entropy.detach())
    loss = cross_entropy.mean() * supervised + 0.4 * reinforce_loss(p, actions, returned)
    expected = gradients(network, loss)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_target_that_is_reached_takes_the_reward_for_skipping_away(monkeypatch):
    network = small_network().eval()
    reached, no_reward, in_force = (
        gradients(
            network,
            loss_in_epoch(monkeypatch, network, off.FitConfig(epochs=1, gates=gates), epoch=0),
        )
        for gates in (
            GateConfig(reward_epochs=1, alpha=5.0, policy_weight=1.0, run_target=0.999),
            GateConfig(reward_epochs=1, alpha=0.0, policy_weight=1.0),
            GateConfig(reward_epochs=1, alpha=5.0, policy_weight=1.0, run_target=0.1),
        )
    )
    torch.testing.assert_close(reached, no_reward)
    assert any((a != b).any() for a, b in zip(reached, in_force, strict=True))


def test_self_critical_epochs_compare_with_what_the_gates_decide(monkeypatch):
    network = small_network().eval()
    gates = GateConfig(reward_epochs=1, alpha=0.7, policy_weight=0.4, self_critical=True)
    config = off.FitConfig(epochs=1, gates=gates)
    found = gradients(network, loss_in_epoch(monkeypatch, network, config, epoch=0))

    torch.manual_seed(7)
    logits, p, actions = pass_by_hand(network, BATCH[0], lambda p: torch.bernoulli(p.detach()))
    greedy_logits, _, decided = pass_by_hand(network, BATCH[0], lambda p: (p >= 0.5).float())
    cross_entropy = F.cross_entropy(logits, BATCH[1], reduction="none")
    earned = returns_to_go(skip_rewards(actions, 0.7), -cross_entropy.detach())
    final = -F.cross_entropy(greedy_logits, BATCH[1], reduction="none").detach()
    own = returns_to_go(skip_rewards(decided, 0.7), final)
    expected = gradients(
        network, cross_entropy.mean() + 0.4 * reinforce_loss(p, actions, (earned - own).detach())
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_settled_epochs_train_the_blocks_under_the_gates_final_decisions(monkeypatch):
    network = small_network().eval()
    gates = GateConfig(reward_epochs=2, settled_epochs=1, policy_weight=3.0)
    config = off.FitConfig(epochs=3, gates=gates)
    found = gradients(network, loss_in_epoch(monkeypatch, network, config, epoch=2))
    logits, _, actions = pass_by_hand(network, BATCH[0], lambda p: (p >= 0.5).float())
    assert set(actions.flatten().tolist()) <= {0.0, 1.0}
    expected = gradients(network, F.cross_entropy(logits, BATCH[1]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    of_gates = {id(parameter) for parameter in network.gates.parameters()}
    still = [g for p, g in zip(network.parameters(), found, strict=True) if id(p) in of_gates]
    assert still
    assert not any(gradient.any() for gradient in still)


@pytest.mark.parametrize(
    ("reward_learning_rate", "expected"),
    [
        (0.003, [0.2, 0.1707107, 0.1, 0.0292893, 0.003, 0.0015]),
        (None, [0.2, 0.1866025, 0.15, 0.1, 0.05, 0.0133975]),
    ],
)
def test_the_learning_rate_falls_by_a_cosine_in_each_phase_or_by_one(
    reward_learning_rate, expected
):
    gates = GateConfig(reward_epochs=2, reward_learning_rate=reward_learning_rate)
    config = off.FitConfig(epochs=6, learning_rate=0.2, gates=gates)
    task = SkipTask(small_network(), config)
    configured = task.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-6)


def test_fit_trains_both_phases_and_reports_blocks(tmp_path):
    network = small_network()
    gates = GateConfig(reward_epochs=8, reward_learning_rate=0.03, alpha=4.0, policy_weight=0.5)
    config = off.FitConfig(epochs=10, batch_size=32, learning_rate=0.02, gates=gates, device="cpu")
    off.fit(network, stripes(256, seed=0), stripes(128, seed=1), config, folder=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["exit_accuracy"][0] > 0.8
    assert [0 <= record["blocks_run"] <= 1 for record in records] == [True] * 10
    assert records[-1]["blocks_run"] < records[1]["blocks_run"]  # alpha is large


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    gates = GateConfig(reward_epochs=2, reward_learning_rate=0.01)
    config = off.FitConfig(epochs=3, batch_size=32, learning_rate=0.02, gates=gates, device="cpu")

    class StopsAfterTwo(off.training.fit.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    data = stripes(64, seed=0)
    unbroken, broken = small_network(), small_network()
    off.fit(unbroken, data, config=config)
    off.fit(broken, data, config=config, folder=tmp_path, callbacks=[StopsAfterTwo()])
    resumed = small_network()
    off.fit(resumed, data, config=config, folder=tmp_path, resume=True)
    for ours, theirs in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reward_epochs", [0, 1])
def test_training_that_diverges_ends_in_an_error(reward_epochs):
    network = small_network()
    torch.nn.init.constant_(next(network.stem.parameters()), float("nan"))
    gates = GateConfig(reward_epochs=reward_epochs)
    config = off.FitConfig(epochs=1, gates=gates, device="cpu")
    with pytest.raises(off.TrainingDivergedError, match="epoch 1: training has diverged"):
        off.fit(network, stripes(16, seed=0), config=config)


def test_a_last_batch_of_one_sample_trains_without_a_baseline():
    network = small_network()
    before = [parameter.clone() for parameter in network.gates.parameters()]
    gates = GateConfig(reward_epochs=1, baseline=True, policy_weight=1.0)
    config = off.FitConfig(epochs=1, batch_size=8, gates=gates, device="cpu")
    off.fit(network, stripes(17, seed=0), config=config)
    moved = [
        not torch.equal(*pair) for pair in zip(before, network.gates.parameters(), strict=True)
    ]
    assert any(moved)


@pytest.mark.parametrize(
    "changes",
    [
        {"reward_epochs": -1},
        {"alpha": -0.1},
        {"reward": "ms"},
        {"policy_weight": -1},
        {"run_target": 1.0},
        {"settled_epochs": 1},
    ],
)
def test_gate_settings_out_of_range_are_refused(changes):
    (name,) = changes
    with pytest.raises(off.InvalidArgumentError, match=f"'{name}'"):
        GateConfig(**changes)


def test_more_reward_epochs_than_epochs_are_refused():
    with pytest.raises(off.InvalidArgumentError, match="at most 2 reward_epochs"):
        off.FitConfig(epochs=2, gates=GateConfig(reward_epochs=3))


def test_settings_of_the_other_kind_of_network_are_refused():
    for setting in ({"detach": True}, {"loss_weights": (1.0,)}, {"backbone_epochs": 1}):
        with pytest.raises(off.InvalidArgumentError, match="about several exits"):
            off.fit(small_network(), stripes(8, seed=0), config=off.FitConfig(**setting))
    exits = resnet(in_channels=1, widths=(8,), blocks=(2,), exits_after=(1,), num_classes=3)
    with pytest.raises(off.InvalidArgumentError, match="about networks that skip"):
        off.fit(exits, stripes(8, seed=0), config=off.FitConfig(gates=GateConfig()))
