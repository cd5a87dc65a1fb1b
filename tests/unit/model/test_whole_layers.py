"""Attention of torch's own, which runs other kernels without gradients than with them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from offramp.errors import BackboneCutError
from offramp.exporting.bundle import export
from offramp.model.cut import add_exits
from offramp.model.exported import Exported
from offramp.model.multi_exit import as_features
from offramp.policy.policies import ThresholdPolicy
from offramp.runtime.session import Session

CLASSES, WIDTH = 3, 8


def layer(**options):
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, **options)


class Encoder(nn.Module):
    """An encoder of several layers, with the masks that its kind of text needs."""

    def __init__(self, *, pads=False, is_causal=False):
        super().__init__()
        self.words = nn.Embedding(20, WIDTH)
        self.encoder = nn.TransformerEncoder(layer(), 3, nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.pads, self.is_causal = pads, is_causal

    def forward(self, ids):
        square = None
        if self.is_causal:
            square = nn.Transformer.generate_square_subsequent_mask(ids.size(1))
        padding = ids == 0 if self.pads else None
        x = self.encoder(self.words(ids), mask=square, src_key_padding_mask=padding)
        return self.head(x[:, 0])


class Series(nn.Module):
    """Numbers in time and their padding."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(4, WIDTH)
        self.encoder = nn.TransformerEncoder(layer(), 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, series, is_padding):
        x = self.encoder(self.start(series), src_key_padding_mask=is_padding)
        return self.head(x[:, 0])


class Blocks(nn.Module):
    """Blocks around attention, whose weights are asked for in the first."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(4, WIDTH)
        self.attention = nn.ModuleList(
            [nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2)]
        )
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        batch, _, _ = x.shape
        x = self.start(x)
        y, weights = self.attention[0](x, x, x)
        x = self.norms[0](x + y * weights.amax(2, keepdim=True))
        x = self.norms[1](x + self.attention[1](x, x, x, need_weights=False)[0])
        return self.head(x.mean(1).reshape(batch, WIDTH))


class SecondAxis(nn.Module):
    """Tokens first, samples second, as torch's layers have them where nobody says otherwise."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, WIDTH)
        self.places = nn.Parameter(torch.randn(9, 1, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids):
        x = self.words(ids).permute(1, 0, 2)
        length, batch, _ = x.shape
        square = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.encoder(x + self.places[:length], square)
        return self.head(x[-1]).reshape(batch, CLASSES)


class Recurrent(nn.Module):
    """A recurrent module of several layers, of which the last state counts."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layers = kind(4, WIDTH, 3, **options)
        directions = 2 if self.layers.bidirectional else 1
        self.start = (3 * directions, WIDTH) if kind is nn.GRU else None
        self.head = nn.Linear(directions * WIDTH, CLASSES)

    def forward(self, x):
        given = () if self.start is None else (x.new_ones(self.start[0], x.size(0), WIDTH),)
        is_second = not self.layers.batch_first
        _, states = self.layers(x.transpose(0, 1) if is_second else x, *given)
        last = states[0] if isinstance(states, tuple) else states
        return self.head(
            torch.cat([last[-1], last[-2]], 1) if self.layers.bidirectional else last[-1]
        )


class StackedLstms(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, WIDTH)
        self.first, self.second = (nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids):
        x, _ = self.first(self.words(ids))
        x, (state, _) = self.second(x)
        return self.head(x[:, -1] + state[-1])


def floats(num):
    return (torch.randn(num, 7, 4),)


def texts(num):
    ids = torch.randint(1, 20, (num, 7))
    ids[-1, 5:] = 0
    return (ids,)


def series(num):
    is_padding = torch.zeros(num, 7, dtype=torch.bool)
    is_padding[-1, 5:] = True
    return torch.randn(num, 7, 4), is_padding


CASES = {
    "no mask": (Encoder, texts, ["encoder.layers.0", "encoder.layers.1"]),
    "padding": (lambda: Encoder(pads=True), texts, ["encoder.layers.0", "encoder.layers.1"]),
    "causal": (lambda: Encoder(is_causal=True), texts, ["encoder.layers.1"]),
    "series": (Series, series, ["encoder.layers.0"]),
    "blocks": (Blocks, floats, ["norms.0"]),
    "samples second": (SecondAxis, texts, ["encoder.layers.0", "encoder.layers.1"]),
    "stacked LSTMs": (StackedLstms, texts, ["first"]),
    "LSTM": (lambda: Recurrent(nn.LSTM, batch_first=True, dropout=0.3), floats, None),
    "GRU": (lambda: Recurrent(nn.GRU, bidirectional=True, dropout=0.3), floats, None),
    "RNN": (lambda: Recurrent(nn.RNN, batch_first=True, nonlinearity="relu"), floats, None),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_exits_between_layers_answer_alike_with_and_without_gradients(case):
    torch.manual_seed(0)
    make, draw, at = CASES[case]
    backbone = make()
    given = {"at": "auto", "num_exits": 3} if at is None else {"at": at}
    network = add_exits(backbone, **given, num_classes=CLASSES, example=draw(2)).eval()
    backbone.eval()
    for num in (1, 2, 3):
        inputs = draw(num)
        with torch.no_grad():
            fused = network(*inputs)
            assert torch.equal(fused[-1], backbone(*inputs))
        for one, other in zip(network(*inputs), fused, strict=True):
            torch.testing.assert_close(one, other)
    *until, whole = network.costs(*draw(1)).exit_macs()
    assert until[0] > 0.15 * whole  # not all of it after the first exit
    outputs = network.train()(*draw(2))
    sum(logits.square().sum() for logits in outputs).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def exits_on_padded_texts():
    backbone = Encoder(pads=True)
    at = ["encoder.layers.0"]
    return add_exits(backbone, at=at, num_classes=CLASSES, example=texts(2)).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_exits_do_not_read_padding():
    torch.manual_seed(0)
    network = exits_on_padded_texts()
    (ids,) = texts(8)
    ids[0, 4:] = 0
    torch.testing.assert_close(network(ids[:1, :4])[0], network(ids)[0][:1])
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(ids)[-1], network(ids)[-1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_padded_texts_cross_to_a_bundle(tmp_path):
    torch.manual_seed(0)
    network = exits_on_padded_texts()
    (ids,) = texts(8)
    bundle = export(network, ThresholdPolicy((0.4,), rule="max_probability"), tmp_path / "b", ids)
    with torch.no_grad():
        expected = torch.stack(network(ids))
    for size in (1, 8):
        for some in range(0, 8, size):
            rows = torch.arange(some, some + size)
            found = Session(bundle, threads=1).run(ids[rows].numpy())
            wanted = expected[torch.as_tensor(found.exit_index).long(), rows]
            torch.testing.assert_close(torch.as_tensor(found.output), wanted, rtol=1e-4, atol=1e-5)


def test_layers_with_hooks_or_a_forward_of_their_own_are_traced():
    class Mine(nn.TransformerEncoderLayer):
        def forward(self, src, *args, **kwargs):
            return super().forward(src, *args, **kwargs) * 2

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([layer(), Mine(WIDTH, 2, 16, batch_first=True)])
            self.layers[0].register_forward_hook(lambda module, args, output: output + 1)
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            for each in self.layers:
                x = each(x)
            return self.head(x.mean(1))

    backbone, x = Two().eval(), torch.randn(2, 7, WIDTH)
    first, second = Exported(backbone, (x,)).stages([1])
    torch.testing.assert_close(second.eval()(*as_features(first.eval()(x))), backbone(x))


def test_what_cannot_be_cut_leaves_the_backbone_as_it_was():
    class Decides(Encoder):
        def forward(self, ids):
            x = self.encoder(self.words(ids))
            return self.head(x[:, 0]) if x.sum() > 0 else self.head(x[:, 1])

    backbone = Decides()
    with pytest.raises(BackboneCutError, match=r"`return self.head"):
        add_exits(backbone, at=["encoder.layers.0"], num_classes=CLASSES, example=texts(2))
    assert all("forward" not in vars(module) for module in backbone.modules())
