"""Batches of unequal length: what is trimmed, what it costs, and that it changes no answer."""

import pytest
import torch
from torch import nn

from offramp import AdaptiveRunner, ThresholdPolicy, count_macs, never_leave, time_runner
from offramp.calibration.collect import collect
from offramp.model.heads import token_head
from offramp.model.multi_exit import MultiExitNetwork
from offramp.model.ragged import Ragged, trim_tokens

WIDTH, CLASSES = 8, 3


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)

    def forward(self, ids):
        return self.table(ids), (ids != 0).long()


class Layer(nn.Module):
    """Attention that leaves padding out, so that no answer hangs on it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.seen = []

    def forward(self, tokens, mask):
        self.seen.append(tuple(tokens.shape[:2]))
        mixed, _ = self.attention(
            tokens, tokens, tokens, key_padding_mask=mask == 0, need_weights=False
        )
        return tokens + mixed, mask


class Stage(nn.Module):
    def __init__(self, *steps):
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, *features):
        for step in self.steps:
            out = step(*features)
            features = out if isinstance(out, tuple) else (out,)
        return features


def network():
    torch.manual_seed(0)
    made = MultiExitNetwork(
        [Stage(Embed(), Layer()), Stage(Layer()), Stage(Layer())],
        [token_head(WIDTH, CLASSES) for _ in range(3)],
    ).eval()
    made.ragged = Ragged(mask_index=1, pad_id=0)
    return made


LENGTHS = (7, 2, 5, 3)
IDS = torch.zeros(4, 9, dtype=torch.int64)  # two columns that nobody needs
for row, length in enumerate(LENGTHS):
    IDS[row, :length] = torch.arange(1, length + 1) * (row + 1)


def test_trimming_keeps_the_longest_and_one_token_at_least():
    mask = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 0, 0]])
    tokens, other = torch.randn(2, 5, 3), torch.randn(2, 4)
    short, whole, kept = trim_tokens((tokens, other, mask), mask != 0)
    assert (short.shape, whole.shape, kept.shape) == ((2, 3, 3), (2, 4), (2, 3))
    assert torch.equal(short, tokens[:, :3])
    assert trim_tokens((mask,), mask < 0)[0].shape == (2, 1)


def test_survivors_are_padded_to_the_longest_of_them():
    net = network()
    confidence = torch.stack(net(IDS))[0].softmax(-1).amax(-1)
    order = confidence.argsort()
    policy = ThresholdPolicy(
        ((confidence[order[1]].item() + confidence[order[2]].item()) / 2, 1.0),
        rule="max_probability",
    )
    layers = [stage.steps[-1] for stage in net.stages]
    for layer in layers:
        layer.seen.clear()
    result = AdaptiveRunner(net, policy).run(IDS)
    longest = max(LENGTHS[row] for row in order[:2].tolist())
    assert layers[0].seen[0] == (4, 7)
    assert layers[1].seen[0] == (2, longest)
    assert sorted(result.exit_index.tolist()) == [0, 0, 2, 2]
    expected = torch.stack(net(IDS))[result.exit_index.tolist(), torch.arange(4)]
    torch.testing.assert_close(result.output, expected)


def test_a_sample_costs_its_own_length_whatever_batch_it_is_in():
    net = network()
    runner = AdaptiveRunner(net, ThresholdPolicy((1.0, 1.0), rule="max_probability"))
    together = runner.run(IDS).macs.tolist()
    alone = [int(runner.run(IDS[row : row + 1]).macs[0]) for row in range(4)]
    assert together == alone
    assert together == [sum_of_parts(net, length) for length in LENGTHS]
    # Projections of q, k, v and out, and two products of T x T: by hand for each of three layers.
    per_layer = [4 * t * WIDTH * WIDTH + 2 * t * t * WIDTH for t in LENGTHS]
    assert together == [3 * macs + 3 * WIDTH * CLASSES for macs in per_layer]


def sum_of_parts(net, length):
    costs = net.costs_at(length, (IDS,))
    return sum(costs.stage_macs) + sum(costs.head_macs)


def test_costs_are_those_of_the_mean_sample():
    net = network()
    costs = net.costs(IDS)
    each = [net.costs_at(length, (IDS,)).stage_macs[0] for length in LENGTHS]
    assert costs.stage_macs[0] == round(sum(each) / 4)
    labels = torch.zeros(4, dtype=torch.int64)
    loader = [(IDS[:1, :7], labels[:1]), (IDS[1:], labels[1:])]
    assert collect(net, loader).costs == costs


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_answer_does_not_depend_on_the_batch(batch_size):
    net = network()
    policy = ThresholdPolicy((0.4, 0.4), rule="max_probability")
    runner = AdaptiveRunner(net, policy)
    whole = runner.run(IDS)
    parts = [runner.run(ids) for ids in IDS.split(batch_size)]
    assert torch.equal(torch.cat([part.exit_index for part in parts]), whole.exit_index)
    torch.testing.assert_close(torch.cat([part.output for part in parts]), whole.output)


def test_each_sample_has_plain_macs_of_its_own_length():
    net = network()
    whole = count_macs(net.plain(), IDS[:1, :1].clone().fill_(1))
    found = net.plain_macs(IDS)
    for row, macs in zip(IDS, found.tolist(), strict=True):
        length = int((row != 0).sum())
        assert macs == net.costs_at(length, (IDS,)).plain_macs >= whole
    assert float(found.double().mean()) == pytest.approx(net.costs(IDS).plain_macs, abs=3)


def test_ideal_gain_of_texts_is_that_of_their_own_plain_macs():
    net = network()
    timing = time_runner(AdaptiveRunner(net, never_leave(3)), IDS, batch_sizes=(1,), rounds=2)
    macs = AdaptiveRunner(net, never_leave(3)).run(IDS).macs
    assert timing.results[0].ideal_speedup == pytest.approx(
        float(net.plain_macs(IDS).sum() / macs.sum())
    )
