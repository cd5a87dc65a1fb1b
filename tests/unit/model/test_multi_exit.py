import pytest
import torch
from torch import nn

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.model.multi_exit import MultiExitNetwork, as_features, take_samples


class Pair(nn.Module):
    """A stage whose cut is crossed by two tensors."""

    def forward(self, x):
        return x, x + 1


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


def gradient_is_none(module: nn.Module) -> bool:
    return all(p.grad is None for p in module.parameters())


def test_forward_gives_every_exit_what_stages_and_heads_chain_to(network):
    x = torch.randn(3, 6)
    first, second, third = network.stages
    expected = [
        network.exits[0](first(x)),
        network.exits[1](second(first(x))),
        network.exits[2](third(second(first(x)))),
    ]
    outputs = network(x)
    assert network.num_exits == len(outputs) == 3
    for output, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(output, wanted)


@pytest.mark.parametrize("training", [True, False])
def test_forward_returns_all_exits_in_both_modes(network, training):
    network.train(training)
    assert [tuple(output.shape) for output in network(torch.randn(2, 6))] == [(2, 4)] * 3


@pytest.mark.parametrize("exit_index", [0, 1])
def test_detached_exits_train_their_head_and_no_stage(network, exit_index):
    network(torch.randn(3, 6), detach=True)[exit_index].sum().backward()
    assert gradient_is_none(network.stages)
    assert not gradient_is_none(network.exits[exit_index])


def test_detaching_keeps_the_final_exit_attached_and_all_values(network):
    x = torch.randn(3, 6)
    outputs = network(x, detach=True)
    for output, attached in zip(outputs, network(x), strict=True):
        assert torch.equal(output, attached)
    outputs[-1].sum().backward()
    assert not any(gradient_is_none(stage) for stage in network.stages)


def test_without_detaching_every_exit_trains_the_stages_before_it(network):
    network(torch.randn(3, 6))[1].sum().backward()
    assert [gradient_is_none(stage) for stage in network.stages] == [False, False, True]


def test_plain_network_equals_the_final_exit_and_shares_its_weights(network):
    x = torch.randn(3, 6)
    plain = network.plain()
    assert torch.equal(plain(x), network(x)[-1])
    with torch.no_grad():
        network.exits[-1].bias.add_(1)
    assert torch.equal(plain(x), network(x)[-1])
    early_heads = {id(p) for head in network.exits[:-1] for p in head.parameters()}
    assert early_heads.isdisjoint(id(p) for p in plain.parameters())


def test_several_tensors_may_cross_a_cut():
    network = MultiExitNetwork([Pair(), Sum()], [Sum(), nn.Identity()])
    x = torch.tensor([[1.0, 5.0]])
    assert [output.tolist() for output in network(x)] == [[[3.0, 11.0]], [[3.0, 11.0]]]
    assert torch.equal(network.plain()(x), network(x)[-1])


def test_costs_are_those_of_stages_and_heads(network):
    costs = network.costs(torch.randn(9, 6))
    assert costs.stage_macs == (30, 40, 56)
    assert costs.head_macs == (20, 32, 28)


def test_costs_of_an_empty_batch_are_refused(network):
    with pytest.raises(ShapeError, match="at least one sample"):
        network.costs(torch.empty(0, 6))


@pytest.mark.parametrize(("num_stages", "num_heads"), [(0, 0), (2, 1), (1, 2)])
def test_as_many_exits_as_stages(num_stages, num_heads):
    with pytest.raises(InvalidArgumentError, match=f"{num_stages} stages and {num_heads} exits"):
        MultiExitNetwork([nn.Identity()] * num_stages, [nn.Identity()] * num_heads)


@pytest.mark.parametrize("output", [None, (), [torch.zeros(1)], {"x": torch.zeros(1)}, (1, 2)])
def test_features_are_a_tensor_or_a_tuple_of_tensors(output):
    with pytest.raises(ShapeError, match=type(output).__name__):
        as_features(output)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_samples_are_taken_in_the_layout_they_had(memory_format):
    maps = torch.rand(5, 3, 4, 4).contiguous(memory_format=memory_format)
    rows, labels = torch.tensor([0, 3]), torch.arange(5)
    taken, taken_labels = take_samples((maps, labels), rows)
    assert torch.equal(taken, maps[[0, 3]])
    assert taken.is_contiguous(memory_format=memory_format)
    assert taken_labels.tolist() == [0, 3]
