"""Heads of other libraries' backbones read channels, wherever the cut leaves their axis."""

import warnings

import pytest
import torch

from offramp import add_exits

CASES = [
    ("torchvision", "swin_t", [-1, -1]),
    ("torchvision", "convnext_tiny", [1, 1]),
    ("timm", "mambaout_femto", [-1, -1]),
    ("timm", "convnext_atto", [1, 1]),
    ("timm", "mixer_s32_224", [-1, -1]),
]
"""Package, network, axes of channels after the two cuts."""


@pytest.mark.parametrize(("package", "name", "axes"), CASES, ids=[case[1] for case in CASES])
def test_chosen_heads_tell_one_channel_from_another(import_or_skip, package, name, axes):
    module = import_or_skip(package)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these packages warn of themselves
        if package == "timm":
            backbone = module.create_model(name, num_classes=5)
        else:
            backbone = module.models.get_model(name, num_classes=5)
    size = 224 if name.endswith("224") else 64
    example = torch.randn(2, 3, size, size)
    network = add_exits(backbone, at="auto", num_exits=3, num_classes=5, example=example).eval()
    features = (example,)
    with torch.no_grad():
        for k, channels in enumerate(axes):
            features = network.run_stage(k, features)
            expected = network.run_exit(k, features)
            for axis in range(1, features[0].ndim):
                flipped = (features[0].flip(axis), *features[1:])
                is_blind = torch.allclose(network.run_exit(k, flipped), expected, atol=1e-4)
                assert is_blind == (axis != channels % features[0].ndim)
