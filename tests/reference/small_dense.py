"""A network of maps of classes with three exits, as a bundle of each kind of policy."""

import math

import torch

from offramp.exporting.bundle import export
from offramp.policy.confidence import pixel_share_confidence, top_probability
from offramp.policy.dense_policies import AgreementPolicy, DensePolicy
from offramp.zoo.segmentation import segmentation

X = torch.randn(6, 3, 20, 24, generator=torch.Generator().manual_seed(0))
WIDTHS = {"share": (4, 6), "agreement": (4,)}
"""Maps of two sizes go on from stage to stage, or one and what the policy remembers."""


def make_network(kind):
    torch.manual_seed(0)
    return segmentation(num_classes=4, widths=WIDTHS[kind], stages=3, head_width=4).eval()


def make_policy(kind):
    """Some of the samples leave at the first exit, where it is not off."""
    if kind == "agreement":
        return AgreementPolicy((1.0, 0.5))
    with torch.no_grad():
        output = make_network(kind)(X)[0]
    pixel_threshold = float(top_probability(output).median())
    shares = pixel_share_confidence(output, pixel_threshold).sort().values
    return DensePolicy((float(shares[2:4].mean()), math.inf), pixel_threshold=pixel_threshold)


def write_bundle(kind, folder):
    export(make_network(kind), make_policy(kind), folder, X, plain=kind == "share")
