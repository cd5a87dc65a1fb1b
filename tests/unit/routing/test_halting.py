"""Tokens that halt: who runs how far, what the answer is, and that nothing leaks."""

import pytest
import torch
from torch import nn

import offramp.routing.halting as halting
from offramp.errors import BackboneCutError, ShapeError
from offramp.measure.cost import count_macs
from offramp.routing.layers import TransformerLayer, attend
from offramp.zoo.vit import vit

OPTIONS = {
    "in_channels": 1,
    "side": 12,
    "patch": 4,
    "width": 24,
    "depth": 5,
    "num_heads": 3,
    "num_classes": 7,
}
IMAGES = torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def small_vit(**changes):
    """With weights far from what they start as, so that tokens halt everywhere."""
    torch.manual_seed(0)
    network = vit(**{**OPTIONS, "gate_scale": 3.0, "gate_center": 2.0, **changes}).eval()
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    return network


class ScoredLayer(TransformerLayer):
    """Gives each token the score that it is told, and keeps the rest of it."""

    num_heads = 1

    def __init__(self, score_BT):
        super().__init__()
        self.score_BT = torch.tensor(score_BT)

    def project(self, x):
        return x, x, x

    def complete(self, x, context):
        return torch.cat([torch.logit(self.score_BT)[..., None], x[..., 1:] + 1], -1)


class Embed(nn.Module):
    def forward(self, x_BTD):
        return x_BTD, x_BTD[..., 1] >= 0


def scored(*scores):
    """A network whose scores are given, layer after layer; answers are the accumulated token."""
    layers = [ScoredLayer(score_BT) for score_BT in scores]
    return halting.HaltingNetwork(Embed(), layers, nn.Identity(), gate_scale=1.0, gate_center=0.0)


def test_a_case_worked_out_by_hand():
    network = scored(
        [[0.5, 0.25, 0.995]],  # the third token halts at once
        [[0.25, 0.75, 0.5]],  # the second reaches 1
        [[0.125, 0.5, 0.5]],  # the class token never does, and gives what is left
    )
    output = network(torch.zeros(1, 3, 2))
    expected = [[[0.5, 0.25, 0.25], [0.25, 0.75, 0], [1, 0, 0]]]
    torch.testing.assert_close(output.weight, torch.tensor(expected))
    assert output.tokens.tolist() == [[3, 2, 1]]
    assert output.depth.tolist() == [[3, 2, 1]]
    torch.testing.assert_close(output.ponder, torch.tensor([[3.25, 2.75, 2.0]]))
    # Its second coordinate is the number of the layer: 0.5 * 1 + 0.25 * 2 + 0.25 * 3.
    assert float(output.logits[0, 1]) == pytest.approx(1.75)


def test_when_the_class_token_halts_its_sample_leaves():
    network = scored([[0.25, 0.25]] * 2, [[0.75, 0.25], [0.25, 0.25]], [[0.5, 0.5]] * 2)
    output = network(torch.zeros(2, 2, 2))
    assert output.tokens.tolist() == [[2, 2, 0], [2, 2, 2]]
    torch.testing.assert_close(
        output.weight[0], torch.tensor([[0.25, 0.75, 0], [0.25, 0.75, 0]])
    )  # the patch token's remainder stands where its sample left
    assert output.logits[:, 1].tolist() == [1.75, 2.25]


def test_patch_tokens_alone_end_nothing():
    output = scored([[0.25, 0.995]], [[0.25, 0.5]])(torch.zeros(1, 2, 2))
    assert output.tokens.tolist() == [[2, 1]]


def test_padding_neither_runs_nor_counts():
    x_BTD = torch.zeros(1, 3, 2)
    x_BTD[0, 2, 1] = -1
    output = scored([[0.25, 0.25, 0.25]], [[0.25, 0.25, 0.25]])(x_BTD)
    assert output.tokens.tolist() == [[2, 2]]
    assert output.weight[0, 2].tolist() == [0, 0]
    assert output.ponder[0, 2] == 0
    assert output.valid.tolist() == [[True, True, False]]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.99, 1.0])
def test_weights_sum_to_one_and_no_token_comes_back(threshold):
    output = small_vit()(IMAGES, threshold=threshold)
    torch.testing.assert_close(output.weight.sum(2), torch.ones(6, 10))
    assert (output.weight >= 0).all()
    runs = output.runs.int()
    assert (runs[..., 1:] <= runs[..., :-1]).all()
    assert (output.weight[~output.runs] == 0).all()
    assert output.runs[..., 0].all()
    assert (output.runs.any(1) == output.runs[:, 0]).all()  # nobody runs without a class token
    assert torch.equal(output.depth, runs.sum(2))
    assert torch.equal(output.tokens, runs.sum(1))


def test_a_threshold_of_zero_stops_after_the_first_layer():
    output = small_vit()(IMAGES, threshold=0.0)
    assert output.tokens.tolist() == [[10, 0, 0, 0, 0]] * 6
    assert output.ponder.tolist() == [[2.0] * 10] * 6


def test_tokens_halt_everywhere_in_the_small_network():
    depth = small_vit()(IMAGES).depth
    assert set(depth.unique().tolist()) >= {1, 2, 5}


def test_a_higher_threshold_never_halts_a_token_at_the_first_layer_that_a_lower_one_kept():
    network = small_vit()
    kept = [network(IMAGES, threshold=t).runs[..., 1] for t in (0.1, 0.5, 0.9)]
    assert (kept[0] <= kept[1]).all()
    assert (kept[1] <= kept[2]).all()


class Disturbed(TransformerLayer):
    """A layer that replaces the tokens it is told of, before it runs."""

    def __init__(self, layer, stopped_BT):
        super().__init__()
        self.layer, self.stopped_BT = layer, stopped_BT
        self.num_heads = layer.num_heads

    def project(self, x):
        return self.layer.project(x)

    def complete(self, x, context):
        return self.layer.complete(x, context)

    def forward(self, x_BTD, is_key_BT=None):
        noise_BTD = 5 * torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(3))
        return super().forward(torch.where(self.stopped_BT[..., None], noise_BTD, x_BTD), is_key_BT)


def test_halted_tokens_do_not_leak():
    network = small_vit()
    expected = network(IMAGES)
    stopped_BTL = ~expected.runs
    assert stopped_BTL[:, 1:].any()
    layers = [
        Disturbed(layer, stopped_BTL[..., index]) for index, layer in enumerate(network.layers)
    ]
    found = halting.HaltingNetwork(
        network.embed,
        layers,
        network.head,
        gate_scale=network.gate_scale,
        gate_center=network.gate_center,
    ).eval()(IMAGES)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_it_is_what_a_loop_that_drops_tokens_gives():
    """One image after the other, halted tokens taken out of the sequence."""
    network = small_vit()
    expected = network(IMAGES)
    with torch.no_grad():
        for row in range(len(IMAGES)):
            x_TD = network.embed(IMAGES[row : row + 1])[0][0]
            total_T, answer_D, tokens = torch.zeros(len(x_TD)), 0, []
            for index, layer in enumerate(network.layers):
                tokens.append(len(x_TD))
                parts = [part[None] for part in layer.project(x_TD)]
                x_TD = layer.complete(x_TD, attend(*parts, layer.num_heads)[0])
                step = halting.advance(total_T, network.score(x_TD), 0.99)
                is_last = index == network.num_layers - 1
                answer_D = answer_D + (1 - total_T[0] if is_last else step.weight[0]) * x_TD[0]
                if step.halts[0]:
                    break
                x_TD, total_T = x_TD[~step.halts], step.total[~step.halts]
            tokens += [0] * (network.num_layers - len(tokens))
            assert expected.tokens[row].tolist() == tokens
            logits_C = network.head(answer_D[None])[0]
            torch.testing.assert_close(expected.logits[row], logits_C, rtol=1e-5, atol=1e-5)


def test_scores_that_are_nan_never_halt():
    step = halting.advance(torch.tensor([0.5, 0.5]), torch.tensor([float("nan"), 0.49]), 0.99)
    assert step.halts.tolist() == [False, True]


def test_gradients_reach_the_coordinate_that_scores():
    network = small_vit()
    output = network(IMAGES)
    output.ponder.sum().backward()
    first = network.layers[0]
    assert first.mlp[2].weight.grad[0].abs().sum() > 0  # the row that makes coordinate 0
    assert network.embed.positions.grad[0, 1:, 0].abs().sum() > 0


def test_the_class_token_is_scored_by_the_labels():
    network = small_vit()
    x_BTD = network.embed(IMAGES)[0].detach().requires_grad_()
    network.embed = nn.Identity()
    network.embed.forward = lambda x: (x, torch.ones(x.shape[:2], dtype=torch.bool))
    network(x_BTD).logits.square().sum().backward()
    assert (x_BTD.grad[:, 0, 0] != 0).all()


def test_plain_is_every_token_in_every_layer():
    network = small_vit()
    x_BTD = network.embed(IMAGES)[0]
    for layer in network.layers:
        x_BTD = layer(x_BTD)
    assert torch.equal(network.plain()(IMAGES), network.head(x_BTD[:, 0]))


def test_weights_are_the_plain_network_s_own():
    plain = vit(**OPTIONS, num_exits=1)
    network = halting.add_halting(plain).eval()
    assert {id(p) for p in plain.parameters()} == {id(p) for p in network.parameters()}
    pointers = [t.data_ptr() for t in network.state_dict().values()]
    assert len(pointers) == len(set(pointers))
    assert torch.equal(network.plain()(IMAGES), plain.eval()(IMAGES)[0])
    again = halting.add_halting(network.without_halting())
    assert torch.equal(again.plain()(IMAGES), network.plain()(IMAGES))


def test_costs_are_those_of_a_closed_form_and_of_what_runs():
    network = small_vit()
    costs = network.costs(IMAGES)
    width, tokens, depth = 24, 10, 5
    linear = (3 + 1 + 2 * 4) * width * width
    assert costs.token_macs == (linear,) * depth
    assert costs.pair_macs == (2 * width,) * depth
    assert costs.fixed_macs == 9 * 16 * width + width * 7
    assert costs.plain_macs == count_macs(network.plain(), IMAGES)
    assert costs.plain_macs == network.without_halting().costs(IMAGES).plain_macs
    assert costs.plain_macs == costs.fixed_macs + depth * tokens * (linear + tokens * 2 * width)
    assert int(costs.macs(torch.full((1, depth), tokens))) == costs.plain_macs
    assert costs.macs_of_length(torch.tensor([tokens])).tolist() == [costs.plain_macs]


def test_costs_leave_out_what_is_dropped():
    costs = halting.HaltingCosts(
        fixed_macs=1000, token_macs=(10, 20), pair_macs=(1, 2), plain_macs=0
    )
    tokens_BL = torch.tensor([[3, 2], [3, 0]])
    assert costs.macs(tokens_BL).tolist() == [1000 + 30 + 9 + 40 + 8, 1000 + 30 + 9]


def test_costs_need_a_sample():
    with pytest.raises(ShapeError, match="at least one sample"):
        small_vit().costs(IMAGES[:0])


def test_other_networks_are_refused():
    with pytest.raises(BackboneCutError, match="Got Linear"):
        halting.add_halting(nn.Linear(3, 3))


SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24, "num_labels": 3}


def bert(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SMALL, vocab_size=20, max_position_embeddings=16, **options)
    return transformers.BertForSequenceClassification(config)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_is_proven_with_inputs_of_its_configuration(attention):
    model = bert(attn_implementation=attention).train()
    halting.add_halting(model)
    assert model.training


@pytest.mark.parametrize("example", [None, (torch.zeros(1, 4).long(), torch.ones(1, 4).long())])
def test_a_transformer_that_does_more_is_refused(example):
    model = bert()
    model.classifier.register_forward_hook(lambda module, inputs, output: output * 2)
    halting.add_halting(model, example=example)  # what its own modules do is kept
    model.bert.pooler.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(BackboneCutError, match="tokens of BertForSequenceClassification cannot"):
        halting.add_halting(model, example=example)


def test_a_network_of_ours_is_proven_where_there_is_an_example():
    plain = vit(**OPTIONS, num_exits=1)
    halting.add_halting(plain, example=IMAGES[:1])
    plain.stages[0].register_forward_hook(lambda module, inputs, output: output.relu())
    with pytest.raises(BackboneCutError, match="another output than the backbone"):
        halting.add_halting(plain, example=IMAGES[:1])
