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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    ],
)
def test_timm_s_networks_that_answer_by_all_tokens_are_refused(import_or_skip, name, options):
    with pytest.raises(BackboneCutError, match="answers by its class token"):
        add_halting(timm_vit(import_or_skip, name, **options))


SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "num_labels": 5,
}


@pytest.mark.parametrize("family", ["ViT", "DeiT"])
def test_transformers_vits_halt(import_or_skip, family):
    transformers = import_or_skip("transformers")
    config = getattr(transformers, f"{family}Config")(**SMALL, image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = disturbed(getattr(transformers, f"{family}ForImageClassification")(config))
    check(model, add_halting(model, **GATE), [IMAGES], lambda x: model(x).logits)


@pytest.mark.parametrize("has_padding", [False, True])
def test_transformers_bert_halts(import_or_skip, has_padding):
    transformers = import_or_skip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, vocab_size=50)
    model = disturbed(transformers.BertForSequenceClassification(config))
    ids_BT = torch.randint(50, (5, 12))
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
