"""An example of each family: a small network, a policy that parts samples, and the samples."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from width import WIDTH, WidthNetwork, WidthPolicy, WidthTask

from offramp.exporting.bundle import EXPORTERS, export
from offramp.families import FAMILIES, family_of
from offramp.policy import as_dict
from offramp.policy.confidence import max_probability_confidence
from offramp.policy.policies import ThresholdPolicy
from offramp.policy.routing_policy import GatePolicy, HaltingPolicy
from offramp.training.fit import TASKS
from offramp.zoo.mlp import mlp
from offramp.zoo.skipnet import skipnet
from offramp.zoo.vit import vit

NUM_CLASSES = 5


@dataclass(frozen=True, kw_only=True)
class Example:
    network: nn.Module
    policy: Any
    inputs: Tensor

    @property
    def family(self):
        return family_of(self.network)

    @property
    def runner(self):
        return self.family.runner(self.network, self.policy)

    @property
    def labels(self):
        return torch.arange(len(self.inputs)) % NUM_CLASSES

    @property
    def batches(self):
        return list(zip(self.inputs.split(16), self.labels.split(16), strict=True))


@torch.no_grad()
def exits():
    network = mlp(in_features=6, widths=(5, 8, 7), num_classes=NUM_CLASSES).eval()
    inputs = torch.randn(40, 6)
    sure = [max_probability_confidence(logits) for logits in network(inputs)[:-1]]
    thresholds = tuple(float(confidence_N.quantile(0.6)) for confidence_N in sure)
    policy = ThresholdPolicy(thresholds, rule="max_probability")
    return Example(network=network, policy=policy, inputs=inputs)


@torch.no_grad()
def skip():
    network = skipnet(in_channels=3, widths=(8, 16), blocks=(2, 2), num_classes=NUM_CLASSES).eval()
    for parameter in network.gates.parameters():
        nn.init.normal_(parameter)
    inputs = torch.randn(40, 3, 16, 16)
    policy = GatePolicy(_between(network(inputs).probability))
    return Example(network=network, policy=policy, inputs=inputs)


def halting():
    size = {"in_channels": 3, "side": 12, "patch": 4, "width": 16, "depth": 2, "num_heads": 2}
    network = vit(**size, num_classes=NUM_CLASSES, gate_scale=1.0, gate_center=1.0).eval()
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.4)
    return Example(network=network, policy=HaltingPolicy(0.7), inputs=torch.randn(40, 3, 12, 12))


@torch.no_grad()
def width():
    network = WidthNetwork(in_features=6, width=8, depth=3, num_classes=NUM_CLASSES).eval()
    inputs = torch.randn(40, 6)
    return Example(network=network, policy=WidthPolicy(_between(network(inputs)[1])), inputs=inputs)


def _between(probability):
    """The middle between the two in the middle, so that none lies on it."""
    values = probability.flatten().sort().values
    return float(values[len(values) // 2 - 1 : len(values) // 2 + 1].mean())


EXAMPLES = {"exits": exits, "skip": skip, "halting": halting, "width": width}


def make_example(name):
    torch.manual_seed(0)
    return EXAMPLES[name]()


@pytest.fixture(scope="package", autouse=True)
def _toy_family():
    """All that the toy family changes: a line in each table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "width", WIDTH)
        patch.setitem(TASKS, "width", WidthTask)
        patch.setitem(as_dict._KINDS, "width", WidthPolicy)
        yield


@pytest.fixture(params=list(EXAMPLES))
def example(request):
    return make_example(request.param)


@pytest.fixture(scope="package", params=list(EXPORTERS))
def exported(request, _toy_family, tmp_path_factory):
    """An example, and the bundle that was written of it."""
    example = make_example(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    return example, export(example.network, example.policy, folder, example.inputs)
