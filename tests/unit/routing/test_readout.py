"""Answers made of more than the class token: what is read, and that halted tokens keep theirs."""

import copy

import pytest
import torch
from torch import nn

from offramp import HaltingPolicy, HaltingRunner, add_halting
from offramp.measure.cost import count_macs
from offramp.model.multi_exit import MultiExitNetwork
from offramp.routing.halting import HaltingNetwork, advance
from offramp.routing.layers import attend
from offramp.routing.token_parts import Readout, TokenParts, as_one_exit, take_apart
from offramp.zoo.vit import vit

OPTIONS = {"in_channels": 1, "side": 12, "patch": 4, "width": 24, "depth": 3, "num_heads": 3}
IMAGES = torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(1))
KINDS = {
    "the mean of all": {"firsts": 0, "mean_from": 0},
    "two tokens": {"firsts": 2},
    "class token and mean": {"firsts": 1, "mean_from": 2},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def plain(request) -> MultiExitNetwork:
    torch.manual_seed(0)
    parts = take_apart(vit(**OPTIONS, num_classes=7, num_exits=1))
    readout = Readout(nn.LayerNorm(24), **request.param)
    head = nn.Linear(24 * readout.num_marks, 7)
    network = as_one_exit(TokenParts(parts.embed, parts.layers, head, readout=readout))
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return network.eval()


def halting(plain) -> HaltingNetwork:
    return add_halting(plain, gate_scale=3.0, gate_center=2.0, example=IMAGES[:1]).eval()


def test_marks_go_with_tokens_and_add_up_to_one():
    readout = Readout(nn.Identity(), firsts=1, mean_from=2)
    marked = readout.mark(torch.ones(2, 5, 3))
    assert marked[0, :, 3:].tolist() == [[1, 0], [0, 0], *[[0, pytest.approx(1 / 3)]] * 3]
    torch.testing.assert_close(readout.shares(marked).sum(1), readout(torch.ones(2, 5, 3)))


def test_the_plain_network_is_the_one_that_was_given(plain):
    network = halting(plain)
    assert torch.equal(network.plain()(IMAGES), plain(IMAGES)[0])
    again = add_halting(network.without_halting())
    assert torch.equal(again.plain()(IMAGES), plain(IMAGES)[0])
    assert {id(p) for p in plain.parameters()} == {id(p) for p in network.parameters()}
    copied = copy.deepcopy(network)
    assert torch.equal(copied(IMAGES).logits, network(IMAGES).logits)


def test_costs_are_those_of_what_runs(plain):
    network = halting(plain)
    assert network.costs(IMAGES).plain_macs == count_macs(network.plain(), IMAGES)


@torch.no_grad()
def test_it_is_what_a_loop_that_drops_tokens_gives(plain):
    """One image after the other, each token's states summed by its scores, and then read."""
    network = halting(plain)
    expected = network(IMAGES)
    assert expected.depth.unique().tolist() == [1, 2, 3]
    embed, layers, head, _, readout = take_apart(plain)
    for row in range(len(IMAGES)):
        x_TD = embed(IMAGES[row : row + 1])[0][0]
        read_TD, total_T = torch.zeros_like(x_TD), torch.zeros(len(x_TD))
        here = torch.arange(len(x_TD))
        for index, layer in enumerate(layers):
            parts = [part[None] for part in layer.project(x_TD)]
            x_TD = layer.complete(x_TD, attend(*parts, layer.num_heads)[0])
            step = advance(total_T, network.score(x_TD), 0.99)
            ends = index == len(layers) - 1 or bool(step.halts[0])
            weight_T = 1 - total_T if ends else step.weight
            read_TD[here] += weight_T[:, None] * readout.norm(x_TD)
            if ends:
                break
            x_TD, total_T, here = (t[~step.halts] for t in (x_TD, step.total, here))
        bare = Readout(nn.Identity(), firsts=readout.firsts, mean_from=readout.mean_from)
        logits_C = head(bare(read_TD[None]))[0]
        torch.testing.assert_close(expected.logits[row], logits_C, rtol=1e-5, atol=1e-5)


def test_the_runner_answers_as_the_masked_pass(plain):
    network = halting(plain)
    with torch.no_grad():
        expected = network(IMAGES, threshold=0.7)
    result = HaltingRunner(network, HaltingPolicy(0.7)).run(IMAGES)
    assert torch.equal(result.tokens, expected.tokens)
    torch.testing.assert_close(result.output, expected.logits, rtol=1e-5, atol=1e-5)
