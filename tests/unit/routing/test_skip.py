"""Gates in front of residual blocks: what is built, what a pass says, what it costs."""

import pytest
import torch
from torch import nn

import offramp.routing.skip as skip
from offramp.errors import BackboneCutError, InvalidArgumentError
from offramp.measure.cost import count_macs
from offramp.routing.gates import Gates
from offramp.zoo.resnet import resnet


def small_resnet(blocks=(2, 2)):
    torch.manual_seed(0)
    network = resnet(
        in_channels=3, widths=(8, 16), blocks=blocks, exits_after=(), num_classes=5
    ).eval()
    for module in network.modules():  # away from the identity that a new one is
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


class FixedGates(Gates):
    """Says what it is told, whatever it sees."""

    def __init__(self, probability_G):
        super().__init__()
        self.score_G = nn.Parameter(torch.logit(torch.tensor(probability_G)))

    def forward(self, index, x, state):
        return self.score_G[index].expand(len(x)), state


def with_fixed_gates(probability_G):
    network = skip.add_gates(small_resnet())
    network.gates = FixedGates(probability_G)
    return network.eval()


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["recurrent", "feed_forward"])
def test_with_every_block_run_it_is_the_plain_network(kind):
    backbone = small_resnet()
    network = skip.add_gates(backbone, gates=kind).eval()
    assert network.num_gates == 3
    everything = network(IMAGES, skip.at_threshold(0.0))
    assert torch.equal(everything.logits, backbone(IMAGES)[0])
    assert torch.equal(everything.logits, network.plain()(IMAGES))
    assert everything.action.min() == 1


def test_weights_are_shared_and_saved_once():
    backbone = small_resnet()
    network = skip.add_gates(backbone)
    own = {id(p) for p in network.parameters()}
    assert {id(p) for p in backbone.parameters()} <= own
    pointers = [t.data_ptr() for t in network.state_dict().values() if t.numel()]
    assert len(pointers) == len(set(pointers))


def test_skipped_blocks_add_nothing():
    network = with_fixed_gates([0.9, 0.2, 0.2])
    x = network.stem(IMAGES)
    x = network.blocks[0](x)
    x = torch.relu(network.blocks[1].shortcut(x))  # changes the shape: its projection remains
    assert torch.equal(network(IMAGES).logits, network.head(x))


def test_the_threshold_itself_runs_and_so_does_nan():
    choose = skip.at_threshold(0.5)
    assert choose(torch.tensor([0.49, 0.5, float("nan"), 1.0])).tolist() == [0, 1, 1, 1]


def test_straight_through_is_hard_forward_and_soft_backward(monkeypatch):
    """Its gradient is the soft gate's at the hard point, for every gate of a real network."""
    hard = with_fixed_gates([0.8, 0.3, 0.6])
    monkeypatch.setattr(skip, "sampled", lambda p: (p > 0.5).float())  # what is drawn
    output = hard(IMAGES, skip.straight_through)
    assert output.action.tolist() == [[1.0, 0.0, 1.0]] * 4
    output.logits.square().sum().backward()
    through = hard.gates.score_G.grad.clone()

    # The gated sum is linear in each action, so d loss / d action at 0 or 1 is what the soft gate
    # would get there; the sigmoid's slope follows.
    actions = torch.tensor([1.0, 0.0, 1.0], requires_grad=True)
    order = iter(range(3))
    logits = hard(IMAGES, lambda p: actions[next(order)].expand(len(p))).logits
    (at_hard_point,) = torch.autograd.grad(logits.square().sum(), actions)
    p = torch.tensor([0.8, 0.3, 0.6])
    torch.testing.assert_close(through, at_hard_point * p * (1 - p), rtol=1e-4, atol=1e-5)


def test_straight_through_draws_its_actions():
    probability = torch.tensor([0.1, 0.5, 0.9]).repeat(50)
    torch.manual_seed(3)
    hard = skip.straight_through(probability)
    torch.manual_seed(3)
    assert hard.tolist() == skip.sampled(probability).tolist()


def test_drawn_actions_follow_the_probabilities_and_carry_no_gradient():
    torch.manual_seed(0)
    probability = torch.tensor([0.1, 0.5, 0.9], requires_grad=True)
    drawn = torch.stack([skip.sampled(probability) for _ in range(4000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert not drawn.requires_grad
    torch.testing.assert_close(drawn.mean(0), probability.detach(), rtol=0, atol=0.04)


@pytest.mark.parametrize("kind", ["recurrent", "feed_forward"])
def test_costs_add_up(kind):
    backbone = small_resnet()
    network = skip.add_gates(backbone, gates=kind)
    costs = network.costs(IMAGES)
    assert costs.plain_macs == count_macs(network.plain(), IMAGES)
    assert costs.plain_macs == backbone.costs(IMAGES).plain_macs
    everything = count_macs(_AllBlocks(network), IMAGES)
    assert int(costs.macs(torch.ones(1, 3, dtype=torch.bool))) == everything


class _AllBlocks(nn.Module):
    """Every block and every gate, the way around none."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        x, state = self.network.stem(x), ()
        for index in range(self.network.num_gates):
            _, state = self.network.ask(index, x, state)
            x = self.network.run_block(index, x)
        return self.network.head(x)


def test_costs_leave_out_what_is_skipped():
    costs = skip.SkipCosts(fixed_macs=100, gate_macs=(1, 2), block_macs=(10, 20))
    blocks = torch.tensor([[True, True], [False, True], [False, False]])
    assert costs.macs(blocks).tolist() == [133, 123, 103]
    assert costs.plain_macs == 130


def test_a_network_without_blocks_to_skip_is_refused():
    with pytest.raises(BackboneCutError, match="at least two blocks"):
        skip.add_gates(small_resnet(blocks=(1, 0)))
    with pytest.raises(BackboneCutError, match="Got Linear"):
        skip.add_gates(nn.Linear(3, 3))
    with pytest.raises(InvalidArgumentError, match="recurrent, feed_forward"):
        skip.add_gates(small_resnet(), gates="lstm")


class ResNetLike(nn.Module):
    """A residual network with torchvision's names, and a forward of the user's own."""

    def __init__(self, run):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        blocks = [[BlockLike(8), BlockLike(8)], [BlockLike(8)], [BlockLike(8)], [BlockLike(8)]]
        self.layer1, self.layer2, self.layer3, self.layer4 = (nn.Sequential(*b) for b in blocks)
        self.attention = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)
        self.run = run

    def usual(self, x, *, between=lambda x: x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(between(self.layer2(self.layer1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def forward(self, x):
        return self.run(self, x)


class BlockLike(nn.Module):
    def __init__(self, width, *, keeps=1.0):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu, self.downsample, self.keeps = nn.ReLU(), None, keeps
        self.attention = nn.Sequential(nn.Conv2d(width, width, 1), nn.Sigmoid())

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return self.relu(self.keeps * x + self.attention(y) * y)


def usual(model, x):
    return model.usual(x)


def attended(model, x):
    return model.usual(x, between=lambda x: x * model.attention(x))


def dropped(model, x):
    return nn.functional.dropout(model.usual(x), 0.5, model.training)


@pytest.mark.parametrize("run", [usual, attended, dropped])
@pytest.mark.parametrize("example", [None, torch.zeros(1, 3, 16, 16)])
def test_what_a_backbone_does_in_blocks_between_them_and_behind_is_kept(run, example):
    backbone = ResNetLike(run).eval()
    network = skip.add_gates(backbone, example=example).eval()
    assert network.num_gates == 4
    assert torch.equal(network(IMAGES, skip.at_threshold(0.0)).logits, backbone(IMAGES))
    torch.manual_seed(0)
    ours = network.plain().train()(IMAGES)
    torch.manual_seed(0)
    assert torch.equal(ours, backbone.train()(IMAGES))


def test_what_stands_between_blocks_runs_though_they_are_skipped():
    backbone = ResNetLike(attended).eval()
    network = skip.add_gates(backbone).eval()
    x = network.stem(IMAGES)
    assert torch.equal(network.skip_block(0, x), x)
    assert torch.equal(network.skip_block(2, x), x * backbone.attention(x))


def test_values_that_decide_are_refused_with_their_line():
    backbone = ResNetLike(lambda m, x: m.usual(x / 255 if x.max() > 10 else x))
    with pytest.raises(BackboneCutError, match=r"line \d+ of test_skip.py") as caught:
        skip.add_gates(backbone)
    assert "\n" not in str(caught.value)


def test_a_shortcut_that_scales_goes_on_when_its_block_is_skipped():
    backbone = ResNetLike(usual)
    backbone.layer3[0] = BlockLike(8, keeps=0.5)
    network = skip.add_gates(backbone).eval()
    x = network.stem(IMAGES)
    assert torch.equal(network.skip_block(1, x), x)
    assert torch.equal(network.skip_block(2, x), 0.5 * x)


class WritesOnItsInput(nn.Module):
    def __init__(self, *, first):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.first = first

    def forward(self, x):
        x = self.stem(x)
        for conv in self.convs:
            x = self.first(x)
            x += conv(x)
        return self.fc(x.mean((2, 3)))


class Halved(nn.Module):
    def forward(self, x):
        return x.mul_(0.5)


def test_a_sum_in_place_leaves_what_the_block_was_given():
    backbone = WritesOnItsInput(first=nn.Identity()).eval()
    network = skip.add_gates(backbone).eval()
    assert torch.equal(network(IMAGES, skip.at_threshold(0.0)).logits, backbone(IMAGES))
    x = network.stem(IMAGES)
    network.run_block(0, x)
    assert torch.equal(network.skip_block(0, x), network.stem(IMAGES))


def test_a_block_that_writes_on_its_input_otherwise_is_refused():
    with pytest.raises(BackboneCutError, match=r"block 1 writes on its input.*'inplace=False'"):
        skip.add_gates(WritesOnItsInput(first=Halved()))


class Sparse(nn.Module):
    """Joins maps rather than adding to them."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.fc(torch.cat([x, self.conv(x)], 1).mean((2, 3)))


def test_a_network_that_adds_nothing_is_refused():
    with pytest.raises(BackboneCutError, match=r"Got Sparse, which has none\. Build a SkipNetwork"):
        skip.add_gates(Sparse())


def test_recurrent_gates_remember_and_feed_forward_gates_do_not():
    for kind, is_told_apart in (("recurrent", True), ("feed_forward", False)):
        torch.manual_seed(0)
        network = skip.add_gates(small_resnet(), gates=kind).eval()
        x = network.blocks[0](network.stem(IMAGES))
        seen = [network.ask(0, earlier, ())[1] for earlier in (x, 3 * x)]
        scores = [network.ask(1, x, state)[0] for state in seen]
        assert torch.equal(*scores) is not is_told_apart
