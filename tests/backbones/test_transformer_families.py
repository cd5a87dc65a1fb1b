"""Halting tokens in other libraries' transformers: the plain pass is the backbone's own."""

import warnings

import pytest
import torch
from torch import nn

from offramp import BackboneCutError, add_halting
from offramp.measure.cost import count_macs

GATE = {"gate_scale": 4.0, "gate_center": 0.0}
IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TIMM = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_patch16_224": {"qk_norm": True, "init_values": 0.1},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"global_pool": "token"},
    "vit_wee_patch16_reg1_gap_256": {},
    "deit_tiny_distilled_patch16_224": {},
    "eva02_tiny_patch14_224": {},
}


def timm_vit(import_or_skip, name, **options):
    timm = import_or_skip("timm")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"img_size": 32, "patch_size": 8, "depth": 3, "num_classes": 5, **options}
        return timm.create_model(name, **options)


@pytest.mark.parametrize("name", TIMM)
def test_timm_halts(import_or_skip, name):
    backbone = disturbed(timm_vit(import_or_skip, name, drop_path_rate=0.1, **TIMM[name]))
    check(backbone, add_halting(backbone, **GATE), [IMAGES], backbone)


def test_timm_s_pooling_by_attention_is_refused(import_or_skip):
    with pytest.raises(BackboneCutError, match="class token or by the mean of its patches"):
        add_halting(timm_vit(import_or_skip, "vit_base_patch16_siglip_224"))


SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "num_labels": 5,
}


IMAGE_KINDS = {
    "ViTForImageClassification": "ViTConfig",
    "DeiTForImageClassification": "DeiTConfig",
    "DeiTForImageClassificationWithTeacher": "DeiTConfig",
    "ViTMSNForImageClassification": "ViTMSNConfig",
    "BeitForImageClassification": "BeitConfig",
    "Dinov2ForImageClassification": "Dinov2Config",
    "Dinov2WithRegistersForImageClassification": "Dinov2WithRegistersConfig",
}


@pytest.mark.parametrize("name", IMAGE_KINDS)
def test_transformers_vits_halt(import_or_skip, name):
    transformers = import_or_skip("transformers")
    config = getattr(transformers, IMAGE_KINDS[name])(**SMALL, image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = disturbed(getattr(transformers, name)(config))
    check(model, add_halting(model, **GATE), [IMAGES], lambda x: model(x).logits)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_transformers_vision_parts_halt(import_or_skip, name):
    transformers = import_or_skip("transformers")
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{name}Config")(vision_config=vision, num_labels=5)
    torch.manual_seed(0)
    model = disturbed(getattr(transformers, f"{name}ForImageClassification")(config))
    check(model, add_halting(model, **GATE), [IMAGES], lambda x: model(x).logits)


def test_torchvision_s_vit_halts(import_or_skip):
    torchvision = import_or_skip("torchvision")
    torch.manual_seed(0)
    model = disturbed(torchvision.models.VisionTransformer(32, 8, 3, 4, 24, 48, num_classes=5))
    check(model, add_halting(model, **GATE), [IMAGES], model)


def test_a_beit_with_a_bias_by_position_is_refused(import_or_skip):
    transformers = import_or_skip("transformers")
    config = transformers.BeitConfig(
        **SMALL, image_size=32, patch_size=8, use_relative_position_bias=True
    )
    with pytest.raises(BackboneCutError, match="use_relative_position_bias=False"):
        add_halting(transformers.BeitForImageClassification(config))


TEXT_KINDS = {
    "Bert": {},
    "Roberta": {},
    "XLMRoberta": {},
    "Camembert": {},
    "Electra": {"embedding_size": 12},
    "Albert": {"embedding_size": 12},
    "DistilBert": {"dim": 24, "n_layers": 3, "n_heads": 3, "hidden_dim": 48},
}


@pytest.mark.parametrize("family", TEXT_KINDS)
@pytest.mark.parametrize("has_padding", [False, True])
def test_transformers_of_texts_halt(import_or_skip, family, has_padding):
    transformers = import_or_skip("transformers")
    torch.manual_seed(0)
    sizes = {"num_labels": 5} if family == "DistilBert" else SMALL
    options = {**sizes, **TEXT_KINDS[family], "vocab_size": 50, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**options, max_position_embeddings=32)
    model = disturbed(getattr(transformers, f"{family}ForSequenceClassification")(config))
    ids_BT = torch.randint(1, 50, (5, 12))
    mask_BT = torch.ones_like(ids_BT)
    if has_padding:
        mask_BT[0, 7:] = mask_BT[1, 3:] = 0
    network = add_halting(model, **GATE)
    check(model, network, [ids_BT, mask_BT], lambda *x: model(*x).logits)
    with torch.no_grad():
        output = network(ids_BT, mask_BT)
        alone = network(ids_BT[1:2, :3], mask_BT[1:2, :3])
    if has_padding:
        assert torch.equal(output.valid, mask_BT.bool())
        torch.testing.assert_close(output.logits[1:2], alone.logits)


def disturbed(backbone):
    """Away from the weights that a new one has, which make all tokens alike; norms stay."""
    for parameter in backbone.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return backbone.eval()


def check(backbone, network, inputs, run):
    network.eval()
    with torch.no_grad():
        assert torch.equal(network.plain()(*inputs), run(*inputs))
        output = network(*inputs)
    depth = output.depth[output.valid]
    assert depth.min() < depth.max()
    own = {id(p) for p in network.parameters()}
    assert own <= {id(p) for p in backbone.parameters()}
    first = [tensor[-1:] for tensor in inputs]
    costs = network.costs(*first)
    assert costs.plain_macs == count_macs(network.plain(), *first)
    assert int(costs.macs(output.tokens)[-1]) < costs.plain_macs
