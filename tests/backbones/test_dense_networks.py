"""Exits on other libraries' segmentation networks, their places found by add_exits."""

import pytest
import torch
from torch import nn

from offramp import add_exits
from offramp.model.proof import logits_of

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
CLASSES = 5


class TakesOut(nn.Module):
    """Returns one entry of the dict that torchvision's networks return."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)["out"]


def torchvision_network(import_or_skip, name):
    models = import_or_skip("torchvision").models
    model = models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES)
    return TakesOut(model)


def segformer(import_or_skip, name):
    transformers = import_or_skip("transformers")
    config = transformers.SegformerConfig(
        num_labels=CLASSES,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=32,
    )
    return getattr(transformers, name)(config)


@pytest.mark.parametrize(
    ("make", "name", "size"),
    [
        (torchvision_network, "lraspp_mobilenet_v3_large", 64),
        pytest.param(
            torchvision_network, "deeplabv3_mobilenet_v3_large", 64, marks=[pytest.mark.slow]
        ),
        pytest.param(segformer, "SegformerForSemanticSegmentation", 16, marks=[pytest.mark.slow]),
    ],
)
def test_dense_exits_are_found_and_trained(import_or_skip, make, name, size):
    torch.manual_seed(0)
    backbone = make(import_or_skip, name).eval()
    network = add_exits(
        backbone, at="auto", num_exits=3, num_classes=CLASSES, example=IMAGES
    ).eval()
    outputs = network(IMAGES)
    assert [tuple(logits.shape) for logits in outputs] == [(2, CLASSES, size, size)] * 3
    assert torch.equal(outputs[-1], logits_of(backbone, (IMAGES,)))
    first, second, third = network.costs(IMAGES).stage_macs
    assert 0.05 * (first + second + third) < first < 0.5 * (first + second + third)
    network.train()
    sum(logits.square().mean() for logits in network(IMAGES)).backward()
    assert all(p.grad is not None for head in network.exits for p in head.parameters())
