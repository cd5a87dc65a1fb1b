import pytest
import torch

from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.zoo import build
from offramp.zoo.convnet import convnet
from offramp.zoo.mlp import mlp
from offramp.zoo.resnet import BasicBlock, resnet
from offramp.zoo.vit import DropPath, vit

BLOCKS = ((("conv", 2, 2),), (("separable", 3, 1),), (("separable", 3, 1), ("separable", 4, 2)))


def small_convnet(**options):
    return convnet(**({"in_channels": 1, "side": 14, "stages": BLOCKS, "num_classes": 5} | options))


def test_mlp_is_the_tutorials_network():
    costs = mlp(in_features=784, widths=(1024, 1024, 1024), num_classes=47).costs(
        torch.zeros(1, 1, 28, 28)
    )
    assert costs.stage_macs == (784 * 1024, 1024 * 1024, 1024 * 1024)
    assert costs.head_macs == (1024 * 47,) * 3


def test_mlp_merges_the_first_layers_where_fewer_exits_are_asked_for():
    costs = mlp(in_features=6, widths=(5, 8, 7), num_classes=4, num_exits=2).costs(
        torch.zeros(1, 6)
    )
    assert costs.stage_macs == (6 * 5 + 5 * 8, 8 * 7)
    assert costs.head_macs == (8 * 4, 7 * 4)


def test_convnet_blocks_cost_their_closed_forms():
    costs = small_convnet(num_classes=5).costs(torch.zeros(1, 1, 14, 14))
    separable_3, separable_3_again = 49 * (9 * 2 + 2 * 3), 49 * (9 * 3 + 3 * 3)
    separable_4 = 16 * (9 * 3 + 3 * 4)  # stride 2: from 7 pixels to 4
    assert costs.stage_macs == (49 * 9 * 2, separable_3, separable_3_again + separable_4)
    # Windows of 3 pixels, 2 apart: 3 x 3 of them on 7 pixels, 1 x 1 on 4.
    assert costs.head_macs == (2 * 9 * 5, 3 * 9 * 5, 4 * 1 * 5)


@pytest.mark.parametrize("num_exits", [1, 2, 3])
def test_merging_exits_keeps_the_plain_network(num_exits):
    x = torch.zeros(1, 1, 14, 14)
    full, merged = small_convnet(), small_convnet(num_exits=num_exits)
    assert merged.num_exits == len(merged(x)) == num_exits
    assert merged.costs(x).plain_macs == full.costs(x).plain_macs
    assert merged.costs(x).head_macs == full.costs(x).head_macs[-num_exits:]


def test_separable_block_adds_its_input_where_the_shape_allows():
    stage = small_convnet().eval().stages[2]
    residual, strided = stage
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(residual(x), x + residual.pointwise(residual.depthwise(x)))
    assert strided(x).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("num_exits", [0, 4, -1])
@pytest.mark.parametrize(
    "network", [small_convnet, lambda **o: mlp(in_features=6, widths=(5, 8, 7), num_classes=4, **o)]
)
def test_number_of_exits_is_checked(network, num_exits):
    with pytest.raises(InvalidArgumentError, match=rf"int in \[1, 3\].* Got {num_exits}"):
        network(num_exits=num_exits)


def test_unknown_block_is_refused():
    with pytest.raises(InvalidArgumentError, match="Got 'pool'"):
        small_convnet(stages=((("pool", 2, 2),),))


def test_build_finds_the_network_by_name():
    network = build("mlp", {"in_features": 6, "widths": (5, 8), "num_classes": 4})
    assert network.costs(torch.zeros(1, 6)).stage_macs == (30, 40)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "transformer",
            {},
            "resnet, segmentation, skim, skipnet, vit. Got 'transf",
        ),
        ("mlp", {"in_features": 6}, "does not take these options"),
        ("mlp", {"in_features": 6, "widths": [5], "num_classes": 4, "depth": 2}, "depth"),
        ("mlp", {"in_features": 6, "widths": [-5], "num_classes": 4}, "does not take"),
        ("mlp", {"in_features": 6, "widths": "wide", "num_classes": 4}, "does not take"),
    ],
)
def test_options_that_a_network_does_not_take(name, options, message):
    with pytest.raises(ArtifactError, match=message):
        build(name, options)


RESNET18 = {
    "in_channels": 3,
    "widths": (64, 128, 256, 512),
    "blocks": (2, 2, 2, 2),
    "exits_after": (2, 4),
    "num_classes": 10,
}


def test_resnet_blocks_cost_their_closed_forms():
    costs = resnet(**RESNET18).costs(torch.zeros(1, 3, 32, 32))
    stem, full = 1024 * 27 * 64, 1024 * 9 * 64 * 64

    def halving(pixels, width):  # a block that halves, and the one after it
        return pixels * width * (9 * width // 2 + 9 * width + width // 2 + 2 * 9 * width)

    assert costs.stage_macs == (
        stem + 4 * full,
        halving(256, 128),
        halving(64, 256) + halving(16, 512),
    )

    def conv_head(pixels, width):
        return pixels * width * (9 + 2 * width) + 2 * width * 10

    assert costs.head_macs == (conv_head(256, 64), conv_head(64, 128), 512 * 10)


def test_resnet_keeps_its_backbone_where_exits_are_merged():
    torch.manual_seed(0)
    whole = resnet(**RESNET18)
    torch.manual_seed(0)
    plain = resnet(**RESNET18, num_exits=1)
    x = torch.zeros(1, 3, 32, 32)
    assert plain.costs(x).stage_macs == (sum(whole.costs(x).stage_macs),)
    assert plain.costs(x).head_macs == whole.costs(x).head_macs[-1:]


def test_basic_block_adds_its_input():
    block = BasicBlock(4, 4).eval()
    torch.nn.init.zeros_(block.body[3].weight)
    x = torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(block(x), x)
    assert BasicBlock(4, 8, stride=2)(x).shape == (2, 8, 3, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"widths": (64, 128)},
        {"exits_after": (4, 2)},
        {"exits_after": (0,)},
        {"exits_after": (8,)},
        {"num_exits": 0},
        {"num_exits": 4},
    ],
)
def test_resnet_that_does_not_fit_together_is_refused(change):
    with pytest.raises(InvalidArgumentError, match="Got"):
        resnet(**{**RESNET18, **change})


VIT = {"in_channels": 1, "side": 8, "patch": 4, "width": 16, "depth": 3, "num_heads": 2}


def test_vit_costs_its_closed_form():
    costs = vit(**VIT, num_classes=5, mlp_ratio=2.0, num_exits=1).costs(torch.zeros(1, 1, 8, 8))
    layer = 5 * (4 + 2 * 2) * 16 * 16 + 2 * 5 * 5 * 16
    assert costs.stage_macs == (4 * 16 * 16 + 3 * layer,)
    assert costs.head_macs == (16 * 5,)


@pytest.mark.parametrize(
    "changes",
    [
        {"patch": 3},
        {"patch": 0},
        {"num_heads": 3},
        {"num_exits": 2},
        {"depth": 0},
        {"gate_scale": (5, 0)},  # --set gate_scale=5,0
        {"gate_center": "abc"},
        {"gate_center": float("nan")},
    ],
)
def test_vit_refuses_what_does_not_fit(changes):
    (name,) = changes
    with pytest.raises(InvalidArgumentError, match=f"'{name}'"):
        vit(**{**VIT, "num_classes": 5, **changes})


def test_paths_are_dropped_by_sample_in_training_only():
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    dropped = drop(x)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped == dropped[:, :1, :1]).all()
    assert float(dropped.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(x), x)
