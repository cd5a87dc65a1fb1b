import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from offramp.errors import ShapeError
from offramp.measure.cost import (
    ExitCosts,
    count_macs,
    counting_macs,
    evaluation_mode,
    parameter_bytes,
    payload_bytes,
)
from offramp.model.multi_exit import MultiExitNetwork
from offramp.model.ragged import Ragged

TOKENS, WIDTH, HEADS = 10, 16, 4


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class LastOfLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


class ScaledDotProduct(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        pytest.param(nn.Linear(784, 1024), (1, 784), 784 * 1024, id="linear"),
        pytest.param(nn.Linear(8, 3, bias=False), (1, 5, 8), 5 * 8 * 3, id="linear on tokens"),
        pytest.param(nn.Conv2d(3, 8, 3, padding=1), (1, 3, 6, 5), 30 * 9 * 3 * 8, id="conv"),
        pytest.param(nn.Conv2d(3, 8, 3, stride=2), (1, 3, 7, 7), 9 * 9 * 3 * 8, id="strided"),
        pytest.param(nn.Conv2d(4, 8, 1, groups=2), (1, 4, 3, 3), 9 * 2 * 8, id="grouped"),
        pytest.param(
            nn.Conv2d(6, 6, 3, padding=1, groups=6), (1, 6, 4, 4), 16 * 9 * 6, id="depthwise"
        ),
        pytest.param(nn.Conv1d(2, 3, 5), (1, 2, 9), 5 * 5 * 2 * 3, id="conv1d"),
        pytest.param(
            nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)), (1, 3, 4, 4), 0, id="none"
        ),
        # Three projections in, scores, weighted values, one projection out.
        pytest.param(
            SelfAttention(),
            (1, TOKENS, WIDTH),
            3 * TOKENS * WIDTH**2 + 2 * TOKENS**2 * WIDTH + TOKENS * WIDTH**2,
            id="multi-head attention",
        ),
        pytest.param(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True),
            (1, TOKENS, WIDTH),
            4 * TOKENS * WIDTH**2 + 2 * TOKENS**2 * WIDTH + 2 * TOKENS * WIDTH * 32,
            id="transformer layer",
        ),
        # Four gates, each from the input and from the hidden state, five times.
        pytest.param(LastOfLSTM(), (1, 5, 6), 5 * 4 * 8 * (6 + 8), id="lstm"),
        pytest.param(
            ScaledDotProduct(),
            (1, HEADS, TOKENS, 8),
            HEADS * 2 * TOKENS**2 * 8,
            id="scaled dot product",
        ),
    ],
)
def test_macs_equal_the_closed_form(module, shape, macs):
    assert count_macs(module, torch.randn(shape)) == macs


def test_macs_are_per_sample_whatever_the_batch():
    module = nn.Linear(7, 3)
    assert count_macs(module, torch.zeros(64, 7)) == count_macs(module, torch.zeros(1, 7)) == 21


def test_several_inputs_are_counted():
    class Product(nn.Module):
        def forward(self, a, b):
            return a @ b.transpose(1, 2)

    assert count_macs(Product(), torch.zeros(2, 3, 4), torch.zeros(2, 6, 4)) == 3 * 4 * 6


@pytest.mark.parametrize("shape", [(0, 7), ()])
def test_counting_needs_a_sample(shape):
    with pytest.raises(ShapeError, match="at least one sample"):
        count_macs(nn.Linear(7, 3), torch.zeros(shape))


def test_counting_restores_every_mode_and_running_statistics():
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    module.train()
    module[1].eval()
    count_macs(module, torch.ones(3, 4))
    assert [child.training for child in module.modules()] == [True, True, False, True]
    assert module[0].num_batches_tracked == 0


def test_modes_and_attention_path_are_restored_after_an_error():
    module = nn.Linear(4, 2)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        count_macs(module, torch.ones(3, 5))
    assert module.training
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_evaluation_mode_holds_inside_the_block():
    module = nn.Sequential(nn.Dropout(), nn.Linear(4, 2)).train()
    with evaluation_mode(module):
        assert not any(child.training for child in module.modules())
    assert all(child.training for child in module.modules())


def test_counting_macs_sums_what_runs_inside_the_block_only():
    module = nn.Linear(7, 3)
    with counting_macs() as counted, torch.inference_mode():
        module(torch.zeros(2, 7))
        module(torch.zeros(1, 7))
    module(torch.zeros(8, 7))
    assert counted() == 3 * 21


def test_exit_costs_add_up_stages_and_the_heads_that_run():
    costs = ExitCosts(stage_macs=(100, 200, 300), head_macs=(1, 2, 4))
    assert costs.num_exits == 3
    assert costs.plain_macs == 604
    assert costs.exit_macs() == (101, 303, 607)
    assert costs.exit_macs(frozenset({0})) == (100, 302, 606)
    assert costs.exit_macs(frozenset({0, 1})) == (100, 300, 604)


def test_parameters_are_counted_once_however_often_they_are_used():
    shared = nn.Linear(6, 5)  # 35 parameters of 4 bytes
    assert parameter_bytes(shared) == 140
    assert parameter_bytes(shared, nn.Sequential(shared, nn.Linear(5, 2).half())) == 140 + 24
    lstm = nn.LSTM(6, 8)  # four gates: weights from 6 and from 8, two biases each
    assert parameter_bytes(lstm) == 4 * 4 * 8 * (6 + 8 + 2)


def test_payload_is_of_one_sample_in_the_bytes_of_its_type():
    features = torch.zeros(3, 16, 7, 7)
    assert payload_bytes(features) == 16 * 49 * 4
    assert payload_bytes(features.half(), torch.zeros(3, dtype=torch.int64)) == 16 * 49 * 2 + 8
    assert payload_bytes(torch.zeros(5)) == 4


def test_decisions_count_to_the_heads_and_not_to_the_plain_network():
    costs = ExitCosts(stage_macs=(10, 20), head_macs=(1, 2)).with_decisions((5, 0))
    assert costs.exit_macs() == (16, 38)
    assert costs.exit_macs(frozenset({0})) == (10, 32)
    assert costs.plain_macs == 32


class Squared(nn.Module):
    def forward(self, weight):
        return weight @ weight


def parametrised():
    linear = nn.Linear(8, 8)
    parametrize.register_parametrization(linear, "weight", Squared())
    return linear


@pytest.mark.parametrize("make", [parametrised, lambda: orthogonal(nn.Linear(8, 8))])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_makes_a_weight_of_others_costs_no_sample_anything(make, context):
    with context():
        assert count_macs(make(), torch.zeros(2, 8)) == 64


@pytest.mark.parametrize(
    ("make", "shape", "macs"),
    [
        (lambda: weight_norm(nn.Conv2d(3, 4, 3)), (1, 3, 8, 8), 3 * 4 * 9 * 36),
        (lambda: spectral_norm(nn.Linear(8, 4)), (1, 8), 32),
        (lambda: torch.nn.utils.spectral_norm(nn.Linear(8, 4)), (1, 8), 32),
        (lambda: QueryOfItsOwn(), (1, 5, 8), 8 * 8 * (1 + 5 + 5 + 1) + 2 * 5 * 8),
    ],
    ids=["weight_norm", "spectral_norm", "with a hook", "pooling by attention"],
)
def test_modules_that_are_given_weights_are_counted_in_inference_mode(make, shape, macs):
    module = make().train()
    with torch.inference_mode():
        assert count_macs(module, torch.zeros(shape)) == macs
    assert module.training
    assert all(p.requires_grad for p in module.parameters())


class QueryOfItsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(self.query, x, x)[0]


def test_frozen_weights_stay_frozen():
    linear = nn.Linear(8, 4)
    linear.bias.requires_grad_(False)
    count_macs(linear, torch.zeros(1, 8))
    assert linear.weight.requires_grad
    assert not linear.bias.requires_grad


@pytest.mark.filterwarnings("ignore:.*(torch.ao.quantization|quantize_per_tensor)")
def test_layers_of_dynamic_quantisation_cost_what_they_did():
    plain = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    small = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    x = torch.zeros(1, 8)
    assert count_macs(small, x) == count_macs(plain, x) == 44


class Packed(nn.Module):
    """Reads no padding, as its ids say where there is some."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=1)
        self.linear = nn.Linear(8, 4)

    def forward(self, ids_BT):
        return self.linear(self.embed(ids_BT)[ids_BT != 1])


def test_tokens_are_those_of_the_batch_not_padding():
    network = MultiExitNetwork([Packed()], [nn.Identity()])
    network.ragged = Ragged(mask_index=0, pad_id=1)
    ids = torch.tensor([[1, 1, 1, 1], [1, 1, 5, 6]])
    assert network.costs_at(3, (ids,)).plain_macs == 3 * 32
    assert network.costs_at(1, (ids,)).plain_macs == 32
    assert network.costs(ids[1:]).plain_macs == 2 * 32
