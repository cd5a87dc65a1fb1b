"""A toy family, to show what a fifth takes: a layer runs half of its channels for easy samples."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from offramp.families.family import EVEN_SCORES, Family, TorchRunner, Words, settled
from offramp.measure.agreement import DECISION_TOLERANCE, Reference
from offramp.measure.cost import count_macs
from offramp.measure.outputs import LABELS
from offramp.model.multi_exit import MultiExitNetwork
from offramp.policy.confidence import max_probability_confidence
from offramp.policy.routing_policy import RoutingPolicy
from offramp.results import AdaptiveResult
from offramp.training.tasks.task import Task


@dataclass(frozen=True)
class WidthPolicy(RoutingPolicy):
    """Run all of a layer where its gate's probability reaches the threshold, else half of it."""

    kind: ClassVar[str] = "width"
    threshold: float = 0.5


class WideLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate = nn.Linear(width, 1)
        self.first, self.rest = nn.Linear(width, width // 2), nn.Linear(width, width // 2)

    def forward(self, x):
        return torch.cat([self.first(x), self.rest(x)], 1).relu()


class WidthNetwork(nn.Module):
    num_exits = 1
    num_classes = None
    outputs = LABELS
    input_specs = ()
    ragged = None

    def __init__(self, in_features, width, depth, num_classes):
        super().__init__()
        self.stem = nn.Linear(in_features, width)
        self.layers = nn.ModuleList(WideLayer(width) for _ in range(depth))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x, threshold=0.5):
        x, probabilities, wide = self.stem(x), [], []
        for layer in self.layers:
            probability_B = layer.gate(x).sigmoid()[:, 0]
            runs_B = probability_B >= threshold
            half, rest = layer.first(x), layer.rest(x) * runs_B[:, None]
            x = torch.cat([half, rest], 1).relu()
            probabilities.append(probability_B)
            wide.append(runs_B)
        return self.head(x), torch.stack(probabilities, 1), torch.stack(wide, 1)

    def full(self):
        return MultiExitNetwork([nn.Sequential(self.stem, *self.layers)], [self.head])

    def plain(self):
        return self.full().plain()

    def trimmed(self, inputs):
        return inputs

    def plain_macs(self, x):
        return torch.full((len(x),), count_macs(self.plain(), x[:1]))

    def macs(self, wide_BL):
        gates = sum(layer.gate.weight.numel() for layer in self.layers)
        always = sum(layer.first.weight.numel() for layer in self.layers)
        rest = self.layers[0].rest.weight.numel()
        ends = self.stem.weight.numel() + self.head.weight.numel()
        return ends + gates + always + rest * wide_BL.sum(1)


class WidthRunner(TorchRunner):
    def __init__(self, network, policy=None):
        self.network, self.policy = settled(
            network, policy, WidthNetwork, WidthPolicy(), "WidthNetwork"
        )

    @torch.no_grad()
    def run(self, x):
        x, wide = self.network.eval().stem(x), []
        for layer in self.network.layers:
            runs_B = layer.gate(x).sigmoid()[:, 0] >= self.policy.threshold
            rest = torch.zeros(len(x), layer.rest.out_features)
            rest[runs_B] = layer.rest(x[runs_B])
            x = torch.cat([layer.first(x), rest], 1).relu()
            wide.append(runs_B)
        output, wide_BL = self.network.head(x), torch.stack(wide, 1)
        return AdaptiveResult(
            output=output,
            exit_index=torch.zeros(len(x), dtype=torch.int64),
            confidence=max_probability_confidence(output),
            macs=self.network.macs(wide_BL),
            blocks=wide_BL,
        )


@torch.no_grad()
def full_pass(network, policy, inputs):
    output, probability_BL, wide_BL = network(*inputs, policy.threshold)
    return Reference(
        output=output,
        exit_index=torch.zeros(len(output), dtype=torch.int64),
        num_exits=1,
        work=wide_BL,
        is_near=lambda: (probability_BL - policy.threshold).abs() < DECISION_TOLERANCE,
    )


class WidthTask(Task):
    takes = WidthNetwork

    def loss(self, inputs, labels_B):
        return F.cross_entropy(self.network(*inputs)[0], labels_B)

    def answers(self, inputs):
        return (self.network(*inputs)[0],)


WIDTH = Family(
    name="width",
    words=Words(
        kind="networks of two widths",
        maker="WidthNetwork",
        does="narrows layers",
        ability="runs half of a layer for easy inputs",
        tag="two-widths",
        heading="Which layers are wide",
        rule="A layer is wide where its gate's probability is at least {policy.threshold:.4f}.",
        use="print(result.output.argmax(-1), result.blocks.sum(1), result.macs)",
        share="layers",
        way="narrowing",
        whole_network="the whole network",
        less="narrow for easy inputs",
        less_metric="with narrow layers",
        whole="every layer wide",
        whole_metric="with wide layers",
    ),
    network=WidthNetwork,
    policy=WidthPolicy,
    as_trained=WidthPolicy(),
    runner=WidthRunner,
    reference=full_pass,
    whole=lambda network: (network.full(), network.full()),
    never=lambda policy: WidthPolicy(0.0),
    thresholds=(1.0, *reversed(EVEN_SCORES), 0.0),
)
