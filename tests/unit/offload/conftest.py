"""A small convolutional network with four exits, cut at each of them, and images for it."""

import numpy as np
import pytest
import torch

from offramp.exporting.bundle import export
from offramp.policy.confidence import max_probability_confidence
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy
from offramp.runtime import Session, read_bundle
from offramp.zoo.convnet import convnet

IMAGES = np.random.default_rng(0).standard_normal((120, 1, 12, 12)).astype(np.float32)


def make_network():
    torch.manual_seed(0)
    stage = (("conv", 6, 1),)
    return convnet(in_channels=1, side=12, stages=(stage,) * 4, num_classes=5).eval()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A bundle whose samples leave everywhere."""
    network = make_network()
    with torch.no_grad():
        confidences = [max_probability_confidence(x) for x in network(torch.from_numpy(IMAGES))]
    thresholds = tuple(float(c.quantile(0.7)) for c in confidences[:-1])
    made = tmp_path_factory.mktemp("offload") / "bundle"
    policy = ThresholdPolicy(thresholds, rule="max_probability")
    export(network, policy, made, torch.from_numpy(IMAGES), plain=False)
    return made


@pytest.fixture(scope="session")
def patient_folder(tmp_path_factory):
    """A bundle whose policy remembers what earlier exits said."""
    made = tmp_path_factory.mktemp("offload") / "patient"
    policy = PatiencePolicy(patience=2, num_exits=4)
    export(make_network(), policy, made, torch.from_numpy(IMAGES), plain=False)
    return made


@pytest.fixture(scope="session")
def bundle(folder):
    return read_bundle(folder)


@pytest.fixture(scope="session")
def images():
    """120 of them."""
    return IMAGES


@pytest.fixture(scope="session")
def whole(bundle):
    """What the undivided network answers."""
    return Session(bundle, threads=1).run(IMAGES)
