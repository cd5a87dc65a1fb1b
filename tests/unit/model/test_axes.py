import pytest
import torch
import torch.nn.functional as F
from small_backbones import BackboneOf, SmallResNet, SmallViT
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from offramp.errors import BackboneCutError
from offramp.model.axes import channel_axis, require_batch_first


def of(run, **children):
    return BackboneOf(run, **children)


def permute(*axes):
    return of(lambda self, x: x.permute(axes))


def first_output(layer):
    return of(lambda self, x: self.layer(x)[0], layer=layer)


class LayerNorm2d(nn.LayerNorm):
    """Turns the axes itself, as torchvision's and timm's."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RootMeanSquare(nn.Module):
    """A normalisation of one's own."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.scale


class Multiplied(nn.Module):
    """Weights that are no module's: a matrix, position embeddings and a class token."""

    def __init__(self, tokens, width):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width))
        self.positions = nn.Parameter(torch.randn(1, tokens + 1, width))
        self.first = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x):
        return F.relu(torch.cat([self.first.expand(len(x), -1, -1), x @ self.matrix], 1)) + (
            self.positions
        )


class MixesTokens(nn.Module):
    def __init__(self, tokens, width, *, norm=nn.LayerNorm):
        super().__init__()
        self.norm = norm(width)
        self.mix = nn.Sequential(nn.Linear(tokens, 9), nn.GELU(), nn.Linear(9, tokens))

    def forward(self, x):
        return x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)


class MixesChannels(nn.Module):
    def __init__(self, width, *, norm=nn.LayerNorm):
        super().__init__()
        self.norm = norm(width)
        self.mix = nn.Sequential(nn.Linear(width, 9), nn.GELU(), nn.Linear(9, width))

    def forward(self, x):
        return x + self.mix(self.norm(x))


def mixer(norm=nn.LayerNorm):
    return nn.Sequential(MixesTokens(6, 6, norm=norm), MixesChannels(6, norm=norm))


SIGNAL, MAP, TOKENS = torch.zeros(2, 2, 6), torch.zeros(2, 3, 6, 6), torch.zeros(2, 6, 6)
"""Examples of zeros, of lengths that are those of the channels."""

conv1d, conv2d = nn.Conv1d(2, 6, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)


@pytest.mark.parametrize(
    ("before", "example", "axis"),
    [
        pytest.param([nn.Sequential(conv1d, nn.ReLU())], SIGNAL, 1, id="Conv1d"),
        pytest.param(
            [conv1d, nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), permute(0, 2, 1))],
            SIGNAL,
            2,
            id="permuted afterwards",
        ),
        pytest.param([conv1d, permute(0, 2, 1)], SIGNAL, 2, id="a stage without weights"),
        pytest.param([conv2d, nn.MaxPool2d(2), nn.ReLU(inplace=True)], MAP, 1, id="pooled"),
        pytest.param([conv2d, nn.GroupNorm(2, 6, affine=False)], MAP, 1, id="GroupNorm"),
        pytest.param([conv2d, nn.InstanceNorm2d(6)], MAP, 1, id="InstanceNorm"),
        pytest.param([conv2d, LayerNorm2d(6)], MAP, 1, id="LayerNorm2d"),
        pytest.param([conv2d, permute(0, 2, 3, 1), nn.LayerNorm(6)], MAP, 3, id="channels last"),
        pytest.param(
            [conv2d, permute(0, 2, 3, 1), nn.LayerNorm(6), permute(0, 3, 1, 2)],
            MAP,
            1,
            id="there and back",
        ),
        pytest.param([nn.Conv2d(3, 24, 1), nn.PixelShuffle(2)], MAP, 1, id="pixel shuffle"),
        pytest.param([nn.ConvTranspose2d(3, 6, 2, 2, bias=False)], MAP, 1, id="transposed"),
        pytest.param([nn.Conv2d(3, 12, 1), nn.GLU(1)], MAP, 1, id="gated"),
        pytest.param([nn.Conv3d(3, 6, 1)], torch.zeros(2, 3, 6, 6, 6), 1, id="video"),
        pytest.param(
            [nn.Conv2d(1, 6, (1, 3)), nn.Conv2d(6, 6, (4, 1), groups=6)],
            torch.zeros(1, 1, 4, 8),
            1,
            id="EEG",
        ),
        pytest.param([first_output(nn.GRU(6, 6, batch_first=True))], TOKENS, 2, id="GRU"),
        pytest.param(
            [of(lambda self, x: self.lstm(x)[0].transpose(1, 2), lstm=nn.LSTM(6, 6))],
            TOKENS,
            1,
            id="LSTM, transposed",
        ),
        pytest.param(
            [nn.TransformerEncoderLayer(6, 2, 9, batch_first=True)], TOKENS, 2, id="encoder layer"
        ),
        pytest.param(
            [of(lambda self, x: self.mha(x, x, x)[0], mha=nn.MultiheadAttention(6, 2))],
            TOKENS,
            2,
            id="attention",
        ),
        pytest.param([nn.Embedding(9, 6)], TOKENS[0].long(), 2, id="embedding"),
        pytest.param([nn.Linear(6, 6), RootMeanSquare(6)], TOKENS, 2, id="norm of one's own"),
        pytest.param(
            [nn.Linear(6, 6), nn.LayerNorm(6, elementwise_affine=False)], TOKENS, 2, id="no weights"
        ),
        pytest.param([Multiplied(6, 6)], TOKENS, 2, id="weights of no module"),
        pytest.param(
            [weight_norm(nn.Conv1d(2, 6, 3, padding=1)), nn.ReLU()], SIGNAL, 1, id="weight_norm"
        ),
    ],
)
def test_the_weights_before_a_cut_tell_the_axis_of_channels(before, example, axis):
    assert channel_axis(before, [], (example,)) == axis


@pytest.mark.parametrize(
    ("before", "after", "axis"),
    [
        pytest.param([mixer()], [mixer()], 2, id="mixer block"),
        pytest.param([mixer(), MixesTokens(6, 6)], [MixesChannels(6)], 2, id="in a mixer block"),
        pytest.param([mixer()], [nn.Linear(6, 3)], None, id="nobody reads channels"),
        pytest.param([mixer(nn.Identity)], [mixer(nn.Identity)], None, id="no norms"),
        pytest.param([nn.Linear(6, 6), nn.BatchNorm1d(6)], [nn.Linear(6, 3)], None, id="against"),
        pytest.param([nn.Identity()], [nn.Conv1d(6, 2, 1)], 1, id="no weights before"),
        pytest.param([nn.Identity()], [nn.Flatten()], None, id="no weights"),
        pytest.param(
            [nn.Identity()],
            [of(lambda self, x: self.last(x.mean(1)), last=nn.Linear(6, 3))],
            2,
            id="a classifier of means",
        ),
        pytest.param(
            [nn.Identity()], [nn.Flatten(), nn.Linear(36, 3)], None, id="a classifier of all"
        ),
        pytest.param([nn.Linear(6, 6), nn.Softmax(-1)], [nn.Flatten()], None, id="softmax"),
        pytest.param(
            [nn.Flatten(), nn.Linear(36, 36), nn.Unflatten(1, (6, 6))], [], None, id="unflattened"
        ),
        pytest.param(
            [nn.LayerNorm([6, 6])], [nn.Flatten(), nn.LayerNorm(36)], None, id="norm over all"
        ),
        pytest.param([nn.LayerNorm([6, 6])], [nn.Conv1d(6, 2, 1)], 1, id="norm over all, read"),
    ],
)
def test_where_weights_disagree_or_are_silent_those_after_the_cut_decide(before, after, axis):
    assert channel_axis(before, after, (TOKENS,)) == axis


def test_shortcuts_and_class_tokens_of_whole_networks():
    resnet, vit = SmallResNet(5), SmallViT(5)
    images = (torch.zeros(1, 3, 32, 32),)
    assert channel_axis([resnet.stem, resnet.layer1, resnet.layer2], [], images) == 1
    assert channel_axis([nn.Linear(6, 12), *vit.layers], [], (TOKENS,)) == 2


def test_batch_norm_before_a_transposition():
    stage = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Flatten(2), permute(0, 2, 1))
    with torch.no_grad():
        assert channel_axis([stage], [], (MAP[:1],)) == 2


@pytest.mark.parametrize("change", ["frozen", "inference", "bfloat16", "channels_last"])
def test_the_axis_does_not_depend_on(change):
    stage, example = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).train(), MAP
    if change == "frozen":
        stage.requires_grad_(False)
    if change == "bfloat16":
        stage, example = stage.bfloat16(), MAP.bfloat16()
    if change == "channels_last":
        example = MAP.to(memory_format=torch.channels_last)
    needs = [p.requires_grad for p in stage.parameters()]
    with torch.inference_mode(change == "inference"):
        assert channel_axis([stage], [], (example.clone(),)) == 1
    assert stage.training
    assert stage[1].num_batches_tracked == 0
    assert [p.requires_grad for p in stage.parameters()] == needs
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stage.modules())


def test_samples_first():
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    require_batch_first(layers, (MAP,), at=["0", "1"])


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        pytest.param([permute(1, 0, 2), nn.Identity()], r"\(6, 1, 6\) for one", id="second"),
        pytest.param([nn.Flatten(0, 1), nn.Identity()], r"\(6, 6\) for one", id="folded in"),
        pytest.param(
            [nn.TransformerEncoderLayer(6, 2, 9), nn.Identity()], "batch_first", id="attention"
        ),
        pytest.param([first_output(nn.GRU(6, 6)), nn.Identity()], "batch_first", id="recurrent"),
        pytest.param(
            [nn.BatchNorm1d(6, track_running_stats=False), nn.Identity()],
            "normalisation",
            id="statistics of the batch",
        ),
    ],
)
def test_features_that_are_not_each_sample_s_own_are_refused(stages, message):
    with pytest.raises(BackboneCutError, match=f"after 'a'.*{message}"):
        require_batch_first(stages, (TOKENS,), at=["a"])
