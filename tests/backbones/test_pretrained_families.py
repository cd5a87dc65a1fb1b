"""The cut network equals the backbone: torchvision's, timm's and transformers' models."""

import copy
import math
import warnings

import pytest
import torch
from small_backbones import logits_of, tensors_of
from torch import nn

from offramp import ThresholdPolicy, add_exits, export
from offramp.families.agreement import answer_in_batches
from offramp.model.cut import _find_cutter, cut_paths
from offramp.runtime import Session

CLASSES = 5
SMALL = {"num_labels": CLASSES, "hidden_size": 48, "num_attention_heads": 3}
SMALL |= {"num_hidden_layers": 3, "intermediate_size": 96}
NARROW = {"num_labels": CLASSES, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64]}


def transformers_model(name, **config):
    def make(transformers):
        kind = "ForSequenceClassification" if name == "Bert" else "ForImageClassification"
        described = getattr(transformers, f"{name}Config")(**config)
        return getattr(transformers, f"{name}{kind}")(described)

    return make


def timm_model(name, **options):
    return lambda timm: timm.create_model(name, num_classes=CLASSES, **options)


def torchvision_model(name):
    return lambda torchvision: getattr(torchvision.models, name)(num_classes=CLASSES)


DROPS = {"drop_rate": 0.2, "drop_path_rate": 0.2}
TRANSFORMERS = {
    "resnet": transformers_model("ResNet", layer_type="basic", embedding_size=16, **NARROW),
    "convnext": transformers_model("ConvNext", drop_path_rate=0.2, **NARROW),
    "vit": transformers_model("ViT", image_size=64, hidden_dropout_prob=0.1, **SMALL),
    "deit": transformers_model("DeiT", image_size=64, **SMALL),
    "segformer": transformers_model(
        "Segformer", num_labels=CLASSES, depths=[1, 1, 1, 1], drop_path_rate=0.2
    ),
    "bert": transformers_model("Bert", vocab_size=100, **SMALL),
}
CASES = [
    *(("torchvision", name, torchvision_model(name), 64) for name in ("resnet18",)),
    ("torchvision", "mobilenet_v3_small", torchvision_model("mobilenet_v3_small"), 64),
    ("torchvision", "vit_b_16", torchvision_model("vit_b_16"), 224),
    ("timm", "resnet18", timm_model("resnet18", **DROPS), 64),
    ("timm", "mobilenetv3_small_100", timm_model("mobilenetv3_small_100", **DROPS), 64),
    ("timm", "vit_tiny_patch16_224", timm_model("vit_tiny_patch16_224", **DROPS), 224),
    ("timm", "efficientnet_b0", timm_model("efficientnet_b0", **DROPS), 64),
    ("timm", "convnext_atto", timm_model("convnext_atto", **DROPS), 64),
    *(("transformers", name, make, 64) for name, make in TRANSFORMERS.items()),
]


@pytest.fixture(
    scope="module", params=CASES, ids=[f"{family} {name}" for family, name, *_ in CASES]
)
def case(request, import_or_skip):
    family, name, make, side = request.param
    package = import_or_skip(family)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these packages warn of themselves
        backbone = make(package)
    if name == "bert":
        mask = torch.ones(4, 12, dtype=torch.int64)
        mask[1, 7:] = 0
        return backbone, (torch.randint(0, 100, (4, 12)), mask)
    return backbone, (torch.randn(4, 3, side, side),)


def cut(backbone, inputs):
    paths = cut_paths(backbone, inputs)
    at = [paths[len(paths) // 3], paths[2 * len(paths) // 3]]
    return add_exits(backbone, at=at, num_classes=CLASSES, example=inputs)


def test_in_evaluation_bit_for_bit(case):
    backbone, inputs = case
    network = cut(backbone, inputs).eval()
    with torch.no_grad():
        outputs = network(*inputs)
        assert torch.equal(outputs[-1], logits_of(backbone.eval()(*inputs)))
    assert [tuple(logits.shape) for logits in outputs] == [(4, CLASSES)] * 3


def test_in_training_with_the_same_seed_and_gradients(case):
    backbone, inputs = case
    alone = copy.deepcopy(backbone).train()
    network = cut(backbone, inputs).train()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = network.plain().train()(*inputs)
        torch.manual_seed(1)
        theirs = logits_of(alone(*inputs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    expected = dict(tensors_of(alone))
    for name, tensor in tensors_of(backbone):
        if tensor.requires_grad and expected[name].grad is not None:
            scale = expected[name].grad.abs().max().clamp(min=1)
            difference = (tensor.grad - expected[name].grad).abs().max()
            assert difference <= 1e-6 * scale, name
    backbone.zero_grad()


def test_checkpoints_go_in_and_out_key_for_key(case):
    backbone, inputs = case
    network = cut(backbone, inputs)
    changed = {key: tensor + 1 for key, tensor in backbone.state_dict().items()}
    kept = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    network.load_backbone_state_dict(changed)
    back = network.backbone_state_dict()
    assert list(back) == list(changed)
    assert all(torch.equal(back[key], changed[key]) for key in changed)
    assert all(torch.equal(t, changed[key]) for key, t in backbone.state_dict().items())
    network.load_backbone_state_dict(kept)


def test_the_bundle_answers_alike(case, tmp_path):
    backbone, inputs = case
    network = cut(backbone, inputs).eval()
    if inputs[0].is_floating_point():
        samples = (torch.randn(24, *inputs[0].shape[1:]),)
    else:
        samples = tuple(tensor.repeat(6, 1) for tensor in inputs)
        samples[0][:] = torch.randint(0, 100, samples[0].shape)
    with torch.no_grad():
        outputs = network(*samples)
    surest = outputs[0].softmax(-1).amax(-1).sort().values
    middle = (surest[11] + surest[12]).item() / 2  # away from every sample
    policy = ThresholdPolicy((middle, math.inf), rule="max_probability")
    session = Session(export(network, policy, tmp_path / "bundle", samples, plain=False))
    answers = answer_in_batches(session, samples, batch_size=5)
    assert answers.exit_index.unique().tolist() == [0, 2]
    expected = torch.stack(outputs)[answers.exit_index, torch.arange(24)]
    torch.testing.assert_close(answers.output, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "make", "side"),
    [("torchvision", torchvision_model("resnet18"), 32), ("timm", CASES[5][2], 224)],
    ids=["torchvision resnet18", "timm vit_tiny_patch16_224"],
)
def test_every_valid_cut_is_valid(family, make, side, import_or_skip):
    backbone = make(import_or_skip(family)).eval()
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = backbone(x)
        cutter = _find_cutter(backbone, (x,), ())
        assert len(cutter.places) > 50
        for path, position in cutter.places.items():
            first, second = cutter.stages([position])
            features = first.eval()(x)
            features = features if isinstance(features, tuple) else (features,)
            assert torch.equal(second.eval()(*(f.clone() for f in features)), expected), path
            alone = second(*(f[1:].clone() for f in features))
            torch.testing.assert_close(alone, expected[1:], rtol=0, atol=1e-4)


def pixel_head(channels, scale):
    """Maps of the backbone's own size."""
    return nn.Sequential(nn.Conv2d(channels, CLASSES, 1), nn.Upsample(scale_factor=scale))


def test_a_pyramid_crosses_the_cuts_of_a_segmentation_model(import_or_skip):
    transformers = import_or_skip("transformers")
    config = transformers.SegformerConfig(num_labels=CLASSES)
    backbone = transformers.SegformerForSemanticSegmentation(config).eval()
    images = torch.randn(2, 3, 64, 64)
    network = add_exits(
        backbone,
        at=["segformer.stages.0", "segformer.stages.2"],
        num_classes=CLASSES,
        example=images,
        heads=[pixel_head(32, 1), pixel_head(160, 4)],
    ).eval()
    with torch.no_grad():
        assert torch.equal(network(images)[-1], backbone(images).logits)
        features = network.run_stage(1, network.run_stage(0, (images,)))
    assert [f.shape[1] for f in features] == [160, 64, 32]
