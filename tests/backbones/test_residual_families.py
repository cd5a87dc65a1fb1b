"""Gates in front of the blocks of other libraries' residual networks."""

import warnings

import pytest
import torch
from small_backbones import logits_of
from torch import nn

from offramp import GatePolicy, SkipRunner, add_gates
from offramp.routing.skip import at_threshold

CASES = [
    ("torchvision", "resnet18", 7),
    ("torchvision", "resnet50", 15),
    ("timm", "resnet18", 7),
    ("timm", "resnet26", 7),
    ("timm", "resnet26d", 7),
    ("torchvision", "mobilenet_v2", 9),
    ("torchvision", "efficientnet_b0", 8),
    ("torchvision", "regnet_y_400mf", 15),
    ("timm", "convnext_atto", 11),
    ("timm", "res2net50_14w_8s", 15),
    ("timm", "resnetv2_50", 15),
    ("transformers", "ResNet", 4),
    ("transformers", "RegNet", 4),
    ("transformers", "ConvNext", 4),
    ("transformers", "Bit", 3),
]
"""Package, network, residual blocks but the first."""

SMALL = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 32, 48, 64], "num_labels": 5}
CONFIGS = {
    "ResNet": {**SMALL, "embedding_size": 16},
    "RegNet": {**SMALL, "embedding_size": 16, "groups_width": 8},
    "ConvNext": {**SMALL, "drop_path_rate": 0.1},
    "Bit": {**SMALL, "depths": [1] * 4, "embedding_size": 16, "num_groups": 8},
}


@pytest.fixture(scope="module", params=CASES, ids=[" ".join(case[:2]) for case in CASES])
def case(request, import_or_skip):
    package, name, num_gates = request.param
    module = import_or_skip(package)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these packages warn of themselves
        if package == "timm":
            backbone = module.create_model(name, num_classes=5, drop_path_rate=0.1)
        elif package == "transformers":
            config = getattr(module, f"{name}Config")(**CONFIGS[name])
            backbone = getattr(module, f"{name}ForImageClassification")(config)
        else:
            backbone = module.models.get_model(name, num_classes=5)
    network = add_gates(backbone).eval()
    for parameter in network.gates.parameters():
        nn.init.normal_(parameter)
    return backbone.eval(), network, num_gates


IMAGES = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_with_every_block_run_it_is_the_backbone(case):
    backbone, network, num_gates = case
    assert network.num_gates == num_gates
    with torch.no_grad():
        everything = network(IMAGES, at_threshold(0.0))
        torch.testing.assert_close(everything.logits, logits_of(backbone(IMAGES)), rtol=0, atol=0)


def threshold_in_a_gap(probability):
    """Far from every probability: what lies in the middle is parted where it is widest apart."""
    middle = probability.flatten().sort().values[len(probability) : -len(probability)]
    widest = int((middle[1:] - middle[:-1]).argmax())
    return float(middle[widest : widest + 2].mean())


def test_skipping_equals_the_gated_sum(case):
    _, network, _ = case
    with torch.no_grad():
        threshold = threshold_in_a_gap(network(IMAGES).probability)
        expected = network(IMAGES, at_threshold(threshold))
    result = SkipRunner(network, GatePolicy(threshold)).run(IMAGES)
    assert (expected.probability - threshold).abs().min() > 1e-4
    assert torch.equal(result.blocks, expected.action.bool())
    torch.testing.assert_close(result.output, expected.logits, rtol=1e-4, atol=1e-4)
    assert 0 < result.blocks.double().mean() < 1
