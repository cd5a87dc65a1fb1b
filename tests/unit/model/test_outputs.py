import pytest
import torch
import torch.nn.functional as F
from small_backbones import BackboneOf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from offramp import (
    AdaptiveRunner,
    DensePolicy,
    FitConfig,
    Session,
    add_exits,
    calibrate,
    collect,
    evaluate,
    export,
    fit,
    label_maps,
)
from offramp.errors import InvalidArgumentError, ShapeError

CLASSES = 4
IMAGES = torch.randn(6, 3, 16, 16)


def block(inputs, outputs, **options):
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Two ways down and up, with skip connections across every cut."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.deep = block(3, 4), block(4, 8), block(8, 12)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(12, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.fuse2, self.fuse1 = block(16, 8), block(8, 4)
        self.last = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x):
        fine = self.down1(x)
        middle = self.down2(self.pool(fine))
        up = self.up2(self.deep(self.pool(middle)))
        up = self.up1(self.fuse2(torch.cat([up, middle], 1)))
        return self.last(self.fuse1(torch.cat([up, fine], 1)))


class PaddedUNet(nn.Module):
    """Pads what comes up to the size of what comes across, as many U-Nets do."""

    def __init__(self):
        super().__init__()
        self.down, self.deep = block(3, 4), nn.Sequential(nn.MaxPool2d(2), block(4, 8))
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.fuse, self.last = block(8, 4), nn.Conv2d(4, CLASSES, 1)

    def forward(self, x):
        fine = self.down(x)
        up = self.up(self.deep(fine))
        rows, columns = fine.size(2) - up.size(2), fine.size(3) - up.size(3)
        up = F.pad(up, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.last(self.fuse(torch.cat([up, fine], 1)))


def coarse():
    """Logits of a quarter of the image's size, from maps of a half and of a quarter."""
    return nn.Sequential(block(3, 4, stride=2), block(4, 8, stride=2), nn.Conv2d(8, CLASSES, 1))


def of_one_size():
    def run(self, x):
        return self.last(self.first(x) + self.positions)

    backbone = BackboneOf(run, first=nn.Conv2d(3, 8, 4, 4), last=nn.Conv2d(8, CLASSES, 1))
    backbone.positions = nn.Parameter(torch.randn(1, 8, 4, 4))
    return backbone


@pytest.mark.parametrize(
    ("backbone", "at", "size", "multiple"),
    [
        pytest.param(UNet(), ["down2", "deep", "fuse2"], (16, 16), 4, id="unet"),
        pytest.param(coarse(), ["0", "1"], (4, 4), 4, id="coarse logits"),
        pytest.param(
            nn.Sequential(block(3, 4), nn.Conv2d(4, CLASSES, 1)), ["0"], (16, 16), 1, id="any size"
        ),
        pytest.param(of_one_size(), ["first"], (4, 4), 16, id="one size"),
    ],
)
def test_a_backbone_with_pixels_gets_dense_heads(backbone, at, size, multiple, capfd):
    network = add_exits(backbone, at=at, num_classes=CLASSES, example=IMAGES[:2]).eval()
    outputs = network(IMAGES)
    assert [tuple(logits.shape) for logits in outputs] == [(6, CLASSES, *size)] * (len(at) + 1)
    assert torch.equal(outputs[-1], backbone.eval()(IMAGES))
    assert network.is_dense
    assert network.pixel_multiple == multiple
    assert capfd.readouterr().err == ""


def test_heads_of_maps_with_channels_last():
    backbone = nn.Sequential(
        nn.Conv2d(3, 6, 4, 4),
        BackboneOf(lambda self, x: x.permute(0, 2, 3, 1)),
        nn.LayerNorm(6),
        BackboneOf(lambda self, x: x.permute(0, 3, 1, 2)),
        nn.Conv2d(6, CLASSES, 1),
        nn.Upsample(scale_factor=4),
    )
    network = add_exits(backbone, at=["2", "3"], num_classes=CLASSES, example=IMAGES[:2]).eval()
    features = network.run_stage(0, (IMAGES,))[0]
    assert features.shape == (6, 4, 4, 6)
    assert network.exits[0][1][0].in_channels == 6
    assert [logits.shape[2:] for logits in network(IMAGES)] == [(16, 16)] * 3


def test_an_own_dense_network_is_trained_collected_and_evaluated():
    labels = (IMAGES.mean(1) * 4).round().clamp(0, CLASSES - 1).long()
    data = TensorDataset(IMAGES, labels)
    network = add_exits(UNet(), at=["deep"], num_classes=CLASSES, example=IMAGES[:2])
    fit(network, data, data, config=FitConfig(epochs=1, batch_size=3, device="cpu"))
    loader = DataLoader(data, batch_size=4)
    logits = collect(network, loader)
    policy = DensePolicy((0.5,), pixel_threshold=0.3)
    runner = AdaptiveRunner(network, policy)
    report = evaluate(runner, loader, logits)
    assert report.mean_iou is not None
    wanted = label_maps(network(IMAGES)[-1], (16, 16)).long()
    right = (wanted == labels).double().mean().item()
    assert report.final_exit_accuracy == pytest.approx(right)


@pytest.mark.parametrize("make", [pytest.param(coarse, marks=pytest.mark.slow), of_one_size])
def test_an_own_dense_network_is_exported(make, tmp_path):
    backbone = make()
    first = next(name for name, _ in backbone.named_children())
    network = add_exits(backbone, at=[first], num_classes=CLASSES, example=IMAGES[:2])
    policy = DensePolicy((1.0,), pixel_threshold=0.999)  # nobody leaves
    bundle = export(network, policy, tmp_path / "bundle", IMAGES[:2], plain=False)
    images = torch.randn(2, 3, 20, 24) if make is coarse else IMAGES[:2]
    torch.testing.assert_close(
        torch.from_numpy(Session(bundle).run(images.numpy()).output),
        network(images)[-1],
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_unet_is_calibrated_and_its_bundle_takes_images_of_several_sizes(tmp_path):
    network = add_exits(
        PaddedUNet(), at="auto", num_exits=2, num_classes=CLASSES, example=IMAGES[:2]
    ).eval()
    assert network.pixel_multiple == 1
    assert {tuple(logits.shape) for logits in network(IMAGES[..., :13])} == {(6, CLASSES, 16, 13)}
    labels = network(IMAGES)[-1].argmax(1)
    logits = collect(network, DataLoader(TensorDataset(IMAGES, labels), batch_size=3))
    policy = calibrate(logits, max_drop=0.5).policy
    runner = AdaptiveRunner(network, policy)
    session = Session(export(network, policy, tmp_path / "bundle", IMAGES[:2], plain=False))
    for size in ((16, 16), (24, 32)):
        images = torch.randn(3, 3, *size)
        found, expected = session.run(images.numpy()), runner.run(images)
        assert found.exit_index.tolist() == expected.exit_index.tolist()
        assert found.macs.tolist() == expected.macs.tolist()
        torch.testing.assert_close(
            torch.from_numpy(found.output), expected.output, rtol=1e-4, atol=1e-4
        )


def ends_in(run):
    return BackboneOf(run, first=nn.Linear(8, 12))


@pytest.mark.parametrize(
    ("run", "num_classes", "message"),
    [
        pytest.param(
            lambda self, x: self.first(x).unflatten(1, (4, 3)), 3, r"\(2, 4, 3\).* tokens", id="BTC"
        ),
        pytest.param(
            lambda self, x: self.first(x).unflatten(1, (4, 3)), 4, "pool the tokens", id="BT=CC"
        ),
        pytest.param(lambda self, x: self.first(x).sum(1), 3, r"\(2,\)", id="B"),
        pytest.param(lambda self, x: self.first(x)[:, :1], 1, "negative class", id="B1"),
        pytest.param(lambda self, x: self.first(x), 3, r"\(2, 12\).*num_classes", id="classes"),
        pytest.param(lambda self, x: self.first(x)[..., None, None], 12, "flatten", id="one pixel"),
        pytest.param(lambda self, x: self.first(x)[:1], 12, "example has 2", id="batch"),
        pytest.param(lambda self, x: self.first(x).long(), 12, "not torch.int64", id="ids"),
    ],
)
def test_a_backbone_that_ends_in_no_logits_is_refused(run, num_classes, message):
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        add_exits(ends_in(run), at=[], num_classes=num_classes, example=torch.randn(2, 8))
    assert "\n" not in str(caught.value)


def test_pixels_with_their_classes_on_the_last_axis_are_refused():
    def run(self, x):
        return self.first(x).permute(0, 2, 3, 1)

    backbone = BackboneOf(run, first=nn.Conv2d(3, CLASSES, 4, 4))
    with pytest.raises(InvalidArgumentError, match="classes are not on the axis after"):
        add_exits(backbone, at=[], num_classes=CLASSES, example=IMAGES[:2])


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_maps_that_are_no_whole_part_of_the_logits_are_interpolated(size):
    last = nn.Upsample((21, size[1] + 5))
    backbone = nn.Sequential(block(3, 4, stride=2), nn.Conv2d(4, CLASSES, 1), last)
    images = torch.randn(2, 3, *size)
    network = add_exits(backbone, at=["0"], num_classes=CLASSES, example=images).eval()
    assert [logits.shape[2:] for logits in network(images)] == [(21, size[1] + 5)] * 2
    assert size[0] % network.pixel_multiple == 0


def tokens(num_others):
    """Tokens of patches of 4 x 4 pixels, behind a few that stand for none."""

    def run(self, x):
        x = self.first(x).flatten(2).transpose(1, 2)
        x = self.mix(torch.cat([self.others.expand(x.shape[0], -1, -1), x], 1))
        x = self.norm(x)[:, num_others:].transpose(1, 2)
        return self.last(x.unflatten(2, (4, 4)))

    parts = {"first": nn.Conv2d(3, 6, 4, 4), "mix": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}
    backbone = BackboneOf(run, **parts, last=nn.Conv2d(6, CLASSES, 1))
    backbone.others = nn.Parameter(torch.randn(1, num_others, 6))
    return backbone


def test_tokens_of_patches_are_laid_out_as_a_map():
    network = add_exits(tokens(1), at=["mix"], num_classes=CLASSES, example=IMAGES[:2]).eval()
    (features,) = network.run_stage(0, (IMAGES,))
    assert features.shape == (6, 17, 6)
    laid_out = network.exits[0][0](features)
    torch.testing.assert_close(laid_out[:, :, 2, 3], features[:, 1 + 2 * 4 + 3])
    assert [logits.shape[2:] for logits in network(IMAGES)] == [(4, 4)] * 2
    assert network.pixel_multiple == 16


def test_tokens_of_no_grid_get_no_dense_head():
    with pytest.raises(ShapeError, match=r"after 'mix'.*\(2, 57, 6\).*no map.*Cut where") as caught:
        add_exits(tokens(41), at=["mix"], num_classes=CLASSES, example=IMAGES[:2])
    assert "\n" not in str(caught.value)


def test_auto_spreads_dense_exits_over_skip_connections():
    backbone = UNet()
    network = add_exits(
        backbone, at="auto", num_exits=3, num_classes=CLASSES, example=IMAGES[:2]
    ).eval()
    first, second, third = network.costs(IMAGES).stage_macs
    assert min(first, second, third) > 0.2 * (first + second + third)
    features = network.run_stage(0, (IMAGES,))
    outputs = network(IMAGES)
    assert {logits.shape for logits in outputs} == {(6, CLASSES, 16, 16)}
    assert torch.equal(outputs[-1], backbone(IMAGES))
    read = set()
    for index in range(len(features)):
        changed = [tensor + (i == index) for i, tensor in enumerate(features)]
        if not torch.equal(network.run_exit(0, changed), outputs[0]):
            read.add(features[index].shape[2:])
    assert read == {tensor.shape[2:] for tensor in features} == {(8, 8), (16, 16)}
    sum(logits.square().mean() for logits in outputs).backward()
    assert all(p.grad is not None for p in network.parameters())
    result = AdaptiveRunner(network, DensePolicy((0.5, 0.5), pixel_threshold=0.4)).run(IMAGES)
    answers = torch.stack(outputs)[result.exit_index, torch.arange(6)]
    torch.testing.assert_close(result.output, answers, rtol=1e-4, atol=1e-5)


def test_given_dense_heads_must_have_logits_of_the_size_of_the_final_exit_s():
    with pytest.raises(
        ShapeError, match=r"logits of shape \(2, 4, 4, 4\).*returns .*\(2, 4, 8, 8\)"
    ):
        add_exits(
            coarse(),
            at=["0"],
            num_classes=CLASSES,
            example=IMAGES[:2],
            heads=[nn.Conv2d(4, CLASSES, 1)],
        )
