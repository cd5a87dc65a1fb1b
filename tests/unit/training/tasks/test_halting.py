"""Training a transformer whose tokens halt, against steps written by hand."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import offramp as off
from offramp.training.fit import Callback
from offramp.training.tasks.halting import HaltingTask
from offramp.training.tasks.ponder import ponder_loss, prior_loss
from offramp.zoo.vit import vit


def small_network(**changes):
    torch.manual_seed(0)
    options = {"in_channels": 1, "side": 8, "patch": 4, "width": 16, "depth": 4, "num_heads": 2}
    gate = {"gate_scale": 4.0, "gate_center": 2.0}
    return vit(**{**options, **gate, "num_classes": 3, **changes})


def stripes(num_samples, *, seed):
    """Images with a bright row at one of three heights: the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num_samples,), generator=generator)
    images = 0.5 * torch.randn(num_samples, 1, 8, 8, generator=generator)
    images[torch.arange(num_samples), :, 3 * labels + 1] += 2
    return TensorDataset(images, labels)


BATCH = stripes(12, seed=0).tensors
HALTING = off.HaltingConfig(
    halting_epochs=1,
    halting_learning_rate=0.01,
    ponder_weight=0.3,
    prior_weight=0.2,
    target_depth=1.5,
)


def loss_in_epoch(monkeypatch, network, config, epoch):
    monkeypatch.setattr(HaltingTask, "current_epoch", epoch)
    return HaltingTask(network, config).loss((BATCH[0],), BATCH[1])


def test_first_epochs_train_the_plain_network(monkeypatch):
    network = small_network()
    config = off.FitConfig(epochs=3, label_smoothing=0.1, halting=HALTING)
    found = loss_in_epoch(monkeypatch, network, config, epoch=1)
    expected = F.cross_entropy(network.plain()(BATCH[0]), BATCH[1], label_smoothing=0.1)
    assert torch.equal(found, expected)


def test_last_epochs_train_with_halting_tokens(monkeypatch):
    network = small_network()
    config = off.FitConfig(epochs=3, label_smoothing=0.1, halting=HALTING)
    found = loss_in_epoch(monkeypatch, network, config, epoch=2)
    output = network(BATCH[0])
    cross_entropy = F.cross_entropy(output.logits, BATCH[1], label_smoothing=0.1)
    expected = cross_entropy + 0.3 * ponder_loss(output) + 0.2 * prior_loss(output, 1.5)
    torch.testing.assert_close(found, expected)


def test_the_target_depth_is_half_the_layers_unless_told():
    network = small_network()
    assert HaltingTask(network, off.FitConfig()).target_depth == 2
    assert HaltingTask(network, off.FitConfig(halting=HALTING)).target_depth == 1.5


def test_the_learning_rate_rises_and_falls_and_starts_again():
    halting = off.HaltingConfig(halting_epochs=2, halting_learning_rate=0.01)
    config = off.FitConfig(epochs=6, learning_rate=0.2, warmup_epochs=1, halting=halting)
    configured = HaltingTask(small_network(), config).configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.2, 0.15, 0.05, 0.01, 0.005], abs=1e-6)


def test_fit_trains_both_phases_and_reports_tokens(tmp_path):
    network = small_network()
    halting = off.HaltingConfig(
        halting_epochs=4, halting_learning_rate=0.005, ponder_weight=0.05, target_depth=1.0
    )
    config = off.FitConfig(
        epochs=8, batch_size=32, learning_rate=0.005, halting=halting, device="cpu"
    )
    off.fit(network, stripes(256, seed=0), stripes(128, seed=1), config, folder=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["exit_accuracy"][0] > 0.8
    assert all("tokens_run" not in record for record in records[:4])
    shares = [record["tokens_run"] for record in records[4:]]
    assert all(0.25 <= share <= 1 for share in shares)
    assert shares[-1] < shares[0]  # pondering is dear


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    halting = off.HaltingConfig(halting_epochs=2, halting_learning_rate=0.01)
    config = off.FitConfig(
        epochs=4, warmup_epochs=1, batch_size=32, learning_rate=0.01, halting=halting, device="cpu"
    )

    class StopsAfterThree(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    data = stripes(64, seed=0)
    unbroken, broken = small_network(drop_path=0.2), small_network(drop_path=0.2)
    off.fit(unbroken, data, config=config)
    off.fit(broken, data, config=config, folder=tmp_path, callbacks=[StopsAfterThree()])
    resumed = small_network(drop_path=0.2)
    off.fit(resumed, data, config=config, folder=tmp_path, resume=True)
    for ours, theirs in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_fit_trains_on_a_gpu():
    halting = off.HaltingConfig(halting_epochs=1)
    config = off.FitConfig(epochs=2, batch_size=32, halting=halting, device="cuda")
    network = small_network(drop_path=0.2)
    off.fit(network, stripes(64, seed=0), stripes(32, seed=1), config)
    assert all(p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"halting_epochs": -1},
        {"halting_learning_rate": 0.0},
        {"ponder_weight": -1},
        {"prior_weight": float("inf")},
        {"target_depth": 0.0},
    ],
)
def test_halting_settings_out_of_range_are_refused(changes):
    (name,) = changes
    with pytest.raises(off.InvalidArgumentError, match=f"'{name}'"):
        off.HaltingConfig(**changes)


def test_more_halting_epochs_than_epochs_are_refused():
    with pytest.raises(off.InvalidArgumentError, match="at most 2 halting_epochs"):
        off.FitConfig(epochs=2, halting=off.HaltingConfig(halting_epochs=3))


def test_a_rise_longer_than_the_first_phase_is_refused():
    with pytest.raises(off.InvalidArgumentError, match=r"'warmup_epochs'.*\[0, 1\]"):
        off.FitConfig(epochs=5, warmup_epochs=2, halting=off.HaltingConfig(halting_epochs=3))


def test_settings_of_the_other_kind_of_network_are_refused():
    data = stripes(8, seed=0)
    with pytest.raises(off.InvalidArgumentError, match="about several exits"):
        off.fit(small_network(), data, config=off.FitConfig(detach=True))
    with pytest.raises(off.InvalidArgumentError, match="about networks that skip"):
        off.fit(small_network(), data, config=off.FitConfig(gates=off.GateConfig()))
    plain = small_network(num_exits=1)
    with pytest.raises(off.InvalidArgumentError, match="about networks whose tokens halt"):
        off.fit(plain, data, config=off.FitConfig(halting=off.HaltingConfig()))
