"""Each way of training against a step written out by hand, in plain torch.

The steps below are given the parts of a network and write the loss and the way of the gradients
out for three exits.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn

from offramp.errors import InvalidArgumentError, TrainingDivergedError
from offramp.model.multi_exit import MultiExitNetwork
from offramp.training.config import FitConfig
from offramp.training.fit import fit
from offramp.training.regimes import (
    balanced_outputs,
    frozen_backbone,
    head_parameters,
    scale_gradient,
    set_training_mode,
)
from offramp.training.tasks.exits import MultiExitTask

INPUTS = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 2, 3, 1])
WEIGHTS = (0.3, 0.5, 2.0)


def layer(width_in, width_out):
    return nn.Sequential(nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out), nn.Tanh())


@pytest.fixture
def network():
    """Three exits, with BatchNorm in the stages and in a head, in double precision."""
    stages = [layer(6, 5), layer(5, 8), layer(8, 7)]
    heads = [nn.Sequential(layer(5, 6), nn.Linear(6, 4)), nn.Linear(8, 4), nn.Linear(7, 4)]
    return MultiExitNetwork(stages, heads).double()


# Steps by hand: gradients of every parameter, by name; none where nothing comes back


def gradients(network, loss):
    loss.backward()
    return {name: p.grad for name, p in network.named_parameters()}


def step_jointly(network, weights=WEIGHTS):
    (stage_0, stage_1, stage_2), (head_0, head_1, head_2) = network.stages, network.exits
    features_0 = stage_0(INPUTS)
    features_1 = stage_1(features_0)
    loss = weights[0] * F.cross_entropy(head_0(features_0), LABELS)
    loss = loss + weights[1] * F.cross_entropy(head_1(features_1), LABELS)
    loss = loss + weights[2] * F.cross_entropy(head_2(stage_2(features_1)), LABELS)
    return gradients(network, loss)


def step_backbone_only(network):
    (stage_0, stage_1, stage_2), (_, _, head_2) = network.stages, network.exits
    logits = head_2(stage_2(stage_1(stage_0(INPUTS))))
    return gradients(network, 2.0 * F.cross_entropy(logits, LABELS))


def step_half_ramped(network):
    return step_jointly(network, weights=(0.15, 0.25, 2.0))


def step_detached(network):
    (stage_0, stage_1, stage_2), (head_0, head_1, head_2) = network.stages, network.exits
    features_0 = stage_0(INPUTS)
    features_1 = stage_1(features_0)
    loss = 0.3 * F.cross_entropy(head_0(features_0.detach()), LABELS)
    loss = loss + 0.5 * F.cross_entropy(head_1(features_1.detach()), LABELS)
    loss = loss + 2.0 * F.cross_entropy(head_2(stage_2(features_1)), LABELS)
    return gradients(network, loss)


def step_distilled(network):
    (stage_0, stage_1, stage_2), (head_0, head_1, head_2) = network.stages, network.exits
    features_0 = stage_0(INPUTS)
    features_1 = stage_1(features_0)
    final = head_2(stage_2(features_1))
    taught_BC = final.detach().softmax(-1)
    loss = 2.0 * F.cross_entropy(final, LABELS)
    for weight, logits in ((0.3, head_0(features_0)), (0.5, head_1(features_1))):
        divergence = (taught_BC * (taught_BC.log() - logits.log_softmax(-1))).sum() / len(LABELS)
        loss = loss + weight * (0.6 * F.cross_entropy(logits, LABELS) + 0.4 * divergence)
    return gradients(network, loss)


def step_frozen(network):
    (stage_0, stage_1, _), (head_0, head_1, _) = network.stages, network.exits
    stage_0.eval()
    stage_1.eval()
    with torch.no_grad():
        features_0 = stage_0(INPUTS)
        features_1 = stage_1(features_0)
    loss = 0.3 * F.cross_entropy(head_0(features_0), LABELS)
    loss = loss + 0.5 * F.cross_entropy(head_1(features_1), LABELS)
    return gradients(network, loss)


def step_in_equilibrium(network):
    """Every loss alone, then a stage's gradients added up, each with its factor.

    Of stage 0, an exit's own factor is 1/3 and that of what passes on 2/3; of stage 1, 1/2 and
    1/2; of stage 2, 1. On their way to stage 0 exit 1 has 1/2 * 2/3 and exit 2 has 1 * 1/2 * 2/3.
    """
    factors = {
        "stages.0": (1 / 3, 1 / 2 * 2 / 3, 1 * 1 / 2 * 2 / 3),
        "stages.1": (0, 1 / 2, 1 * 1 / 2),
        "stages.2": (0, 0, 1),
        "exits.0": (1, 0, 0),
        "exits.1": (0, 1, 0),
        "exits.2": (0, 0, 1),
    }
    (stage_0, stage_1, stage_2), (head_0, head_1, head_2) = network.stages, network.exits
    features_0 = stage_0(INPUTS)
    features_1 = stage_1(features_0)
    outputs = head_0(features_0), head_1(features_1), head_2(stage_2(features_1))
    total = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for k, (weight, logits) in enumerate(zip(WEIGHTS, outputs, strict=True)):
        alone = torch.autograd.grad(
            weight * F.cross_entropy(logits, LABELS),
            list(network.parameters()),
            retain_graph=True,
            allow_unused=True,
        )
        for name, gradient in zip(total, alone, strict=True):
            if gradient is not None:
                total[name] += factors[name[:8].rstrip(".")][k] * gradient
    return total


def step_of_task(network, config, epoch, monkeypatch):
    """Gradients after one training step of the task, as ``fit`` has it run."""
    monkeypatch.setattr(MultiExitTask, "current_epoch", epoch)
    task = MultiExitTask(network, config)
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    task.on_train_epoch_start()
    return gradients(network, task.training_step((INPUTS, LABELS), 0))


@pytest.mark.parametrize(
    ("settings", "epoch", "by_hand"),
    [
        pytest.param({}, 0, step_jointly, id="joint"),
        pytest.param({"backbone_epochs": 2}, 1, step_backbone_only, id="mixed, at first"),
        pytest.param({"backbone_epochs": 2}, 2, step_jointly, id="mixed, then"),
        pytest.param({"ramp_epochs": 3}, 1, step_half_ramped, id="ramp, half way"),
        pytest.param({"ramp_epochs": 3}, 3, step_jointly, id="ramp, after"),
        pytest.param({"detach": True}, 0, step_detached, id="detached"),
        pytest.param({"distillation": 0.4}, 0, step_distilled, id="distillation"),
        pytest.param({"gradient_equilibrium": True}, 0, step_in_equilibrium, id="equilibrium"),
        pytest.param(
            {"gradient_equilibrium": True, "backbone_epochs": 1},
            0,
            step_backbone_only,
            id="equilibrium, backbone first",
        ),
        pytest.param(
            {"gradient_equilibrium": True, "backbone_epochs": 1},
            1,
            step_in_equilibrium,
            id="equilibrium, then",
        ),
    ],
)
def test_step_equals_the_one_by_hand(network, settings, epoch, by_hand, monkeypatch):
    expected = by_hand(deepcopy(network))
    config = FitConfig(loss_weights=WEIGHTS, **settings)
    found = step_of_task(network, config, epoch, monkeypatch)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        by_hand_or_none = expected[name]
        wanted = torch.zeros_like(gradient) if by_hand_or_none is None else by_hand_or_none
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_frozen_step_equals_the_one_by_hand(network, monkeypatch):
    expected = step_frozen(deepcopy(network))
    config = FitConfig(loss_weights=WEIGHTS, freeze_backbone=True)
    with frozen_backbone(network):
        found = step_of_task(network, config, 0, monkeypatch)
    for name, gradient in found.items():
        if name.startswith(("exits.0", "exits.1")):
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)
        else:
            assert gradient is None, name


# Gradient equilibrium


def test_values_are_those_of_the_forward_pass(network):
    network.eval()
    for balanced, plain in zip(balanced_outputs(network, INPUTS), network(INPUTS), strict=True):
        assert torch.equal(balanced, plain)


def test_first_stage_learns_from_the_mean_however_many_exits_there_are():
    # Every stage passes on, every head does too: each loss alone has the derivative 1.
    stage_0 = nn.Linear(1, 1, bias=False)
    nn.init.ones_(stage_0.weight)
    stages = [stage_0, *(nn.Identity() for _ in range(6))]
    network = MultiExitNetwork(stages, [nn.Identity() for _ in stages])
    sum(balanced_outputs(network, torch.ones(1, 1))).backward()
    assert stage_0.weight.grad.item() == pytest.approx(1)
    stage_0.weight.grad = None
    sum(network(torch.ones(1, 1))).backward()
    assert stage_0.weight.grad.item() == 7


def test_scaled_gradient_and_what_asks_for_none():
    features = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    mask = torch.tensor([1, 0])
    scaled, same_mask = scale_gradient((features, mask), 0.25)
    assert torch.equal(scaled, features)
    assert scaled.is_contiguous(memory_format=torch.channels_last)
    assert same_mask is mask
    (scaled * torch.arange(5.0)).sum().backward()
    assert torch.equal(features.grad, 0.25 * torch.arange(5.0).expand_as(features))


class PairStage(nn.Module):
    """Two tensors cross the cut: features, and a mask that no gradient passes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, mask=None):
        return self.linear(x), (x > 0).all(-1) if mask is None else mask


class PairHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, mask):
        return self.linear(x) * mask[:, None]


def test_tensors_without_a_gradient_cross_in_equilibrium():
    network = MultiExitNetwork([PairStage(), PairStage()], [PairHead(), PairHead()])
    x = torch.rand(4, 3)
    for balanced, plain in zip(balanced_outputs(network, x), network(x), strict=True):
        assert torch.equal(balanced, plain)


def test_stage_that_works_in_place_is_balanced_like_another():
    linear = nn.Linear(3, 3)

    def first_gradient(activation):
        network = MultiExitNetwork(
            [deepcopy(linear), nn.Sequential(activation, nn.Flatten())],
            [nn.Softmax(-1), nn.Identity()],
        )
        first, last = balanced_outputs(network, torch.eye(3))
        (first[:, 0].sum() + last.sum()).backward()
        return network.stages[0].weight.grad

    torch.testing.assert_close(first_gradient(nn.ReLU(inplace=True)), first_gradient(nn.ReLU()))


# Frozen


@pytest.fixture
def droppy():
    """Two early exits and a final one; BatchNorm and dropout in stages and heads."""

    def part(width_in, width_out):
        return nn.Sequential(
            nn.BatchNorm1d(width_in), nn.Dropout(0.5), nn.Linear(width_in, width_out)
        )

    stages = [part(6, 5), part(5, 5), part(5, 5)]
    return MultiExitNetwork(stages, [part(5, 4) for _ in stages]).eval()


PAIRS = [(x.float(), int(label)) for x, label in zip(INPUTS, LABELS, strict=True)][:8]
FROZEN = FitConfig(epochs=2, batch_size=4, learning_rate=0.1, freeze_backbone=True, device="cpu")


def is_frozen(name):
    return not name.startswith(("exits.0", "exits.1"))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_parts_stay_bit_for_bit_and_heads_learn(droppy, optimizer):
    before = deepcopy(droppy.state_dict())
    fit(droppy, PAIRS, PAIRS, replace(FROZEN, optimizer=optimizer))
    for name, tensor in droppy.state_dict().items():
        assert torch.equal(tensor, before[name]) == is_frozen(name), name
    assert not any(module.training for module in droppy.modules())


def test_without_freezing_every_part_moves(droppy):
    before = deepcopy(droppy.state_dict())
    fit(droppy, PAIRS, config=FitConfig(batch_size=4, epochs=1, device="cpu"))
    moved = [not torch.equal(tensor, before[name]) for name, tensor in droppy.state_dict().items()]
    assert all(moved)


class ModeWatcher(Callback):
    """Notes at every batch which modules train and which parameters ask for a gradient."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        network = pl_module.network
        modules = {name for name, module in network.named_modules() if module.training}
        asking = {name for name, p in network.named_parameters() if p.requires_grad}
        self.seen.append((modules, asking))


def test_only_heads_are_in_training_mode_in_every_epoch(droppy):
    watcher = ModeWatcher()
    fit(droppy, PAIRS, PAIRS, FROZEN, callbacks=[watcher])
    assert len(watcher.seen) == 4  # two batches in each epoch, calibration data run between
    for modules, asking in watcher.seen:
        inner = {name for name in modules if "." in name}
        assert inner == {n for n, _ in droppy.named_modules() if "." in n and not is_frozen(n)}
        assert asking == {n for n, _ in droppy.named_parameters() if not is_frozen(n)}


def test_frozen_stages_build_no_graph(droppy):
    set_training_mode(droppy, is_frozen=True)
    with frozen_backbone(droppy):
        (features,) = droppy.run_stage(0, (INPUTS.float(),))
        first, second, final = droppy(INPUTS.float())
    assert not features.requires_grad
    assert [logits.requires_grad for logits in (first, second, final)] == [True, True, False]


def test_requires_grad_is_as_before_after_training(droppy):
    own = [droppy.stages[0][2].bias, droppy.exits[0][2].bias, droppy.exits[2][2].bias]
    for parameter in own:
        parameter.requires_grad_(False)
    before = {name: p.requires_grad for name, p in droppy.named_parameters()}
    fit(droppy, PAIRS, config=FROZEN)
    assert {name: p.requires_grad for name, p in droppy.named_parameters()} == before


@pytest.mark.filterwarnings("ignore:The 'train_dataloader'")
def test_requires_grad_is_as_before_after_an_error(droppy):
    torch.nn.init.constant_(droppy.exits[0][2].weight, torch.inf)
    with pytest.raises(TrainingDivergedError):
        fit(droppy, PAIRS, config=FROZEN)
    assert all(p.requires_grad for p in droppy.parameters())


def test_what_an_exit_shares_with_the_final_one_is_frozen():
    shared = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    stages = [nn.Linear(3, 3), nn.Linear(3, 3)]
    network = MultiExitNetwork(stages, [nn.Sequential(nn.Linear(3, 3), shared), shared])
    set_training_mode(network, is_frozen=True)
    assert not shared[0].training
    own = network.exits[0][0]
    assert head_parameters(network) == [own.weight, own.bias]
    with frozen_backbone(network):
        assert [p for p in network.parameters() if p.requires_grad] == [own.weight, own.bias]


@pytest.mark.parametrize(
    ("heads", "num_early"),
    [
        pytest.param([nn.Linear(3, 2)], 0, id="one exit"),
        pytest.param([nn.Identity(), nn.Linear(3, 2)], 1, id="no weights"),
        pytest.param([nn.Linear(3, 2)] * 2, 1, id="the final exit's weights"),
    ],
)
def test_frozen_backbone_that_leaves_nothing_to_train_is_refused(heads, num_early):
    network = MultiExitNetwork([nn.Linear(3, 3) for _ in heads], heads)
    with pytest.raises(InvalidArgumentError, match=f"This network has {num_early} of them"):
        fit(network, PAIRS, config=FROZEN)
