"""A small convolutional network with four exits, as bundles, and images for it."""

import numpy as np
import torch

from offramp.exporting.bundle import export
from offramp.policy.confidence import max_probability_confidence
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy
from offramp.zoo.convnet import convnet

IMAGES = np.random.default_rng(0).standard_normal((120, 1, 12, 12)).astype(np.float32)


def make_network():
    torch.manual_seed(0)
    stage = (("conv", 6, 1),)
    return convnet(in_channels=1, side=12, stages=(stage,) * 4, num_classes=5).eval()


def write_bundle(folder):
    """A bundle whose samples leave everywhere."""
    network = make_network()
    with torch.no_grad():
        confidences = [max_probability_confidence(x) for x in network(torch.from_numpy(IMAGES))]
    thresholds = tuple(float(c.quantile(0.7)) for c in confidences[:-1])
    policy = ThresholdPolicy(thresholds, rule="max_probability")
    export(network, policy, folder, torch.from_numpy(IMAGES), plain=False)


def write_patient_bundle(folder):
    """A bundle whose policy remembers what earlier exits said."""
    policy = PatiencePolicy(patience=2, num_exits=4)
    export(make_network(), policy, folder, torch.from_numpy(IMAGES), plain=False)
