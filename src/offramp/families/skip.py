"""The family of networks that skip blocks: a block runs on the samples whose gate wants it.

Shapes: ``B`` batch, ``C`` classes, ``G`` gates.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from offramp.families.family import Family, TorchRunner, Words, settled
from offramp.measure.agreement import DECISION_TOLERANCE, Reference
from offramp.model.inputs import Given, as_inputs, explained
from offramp.model.multi_exit import Features, MultiExitNetwork, take_samples
from offramp.policy.choice import Choice
from offramp.policy.confidence import max_probability_confidence
from offramp.policy.routing_policy import GatePolicy
from offramp.results import AdaptiveResult
from offramp.routing.gates import GateState
from offramp.routing.skip import SkipCosts, SkipNetwork, at_threshold, runs_block
from offramp.tables import percent


class SkipRunner(TorchRunner[SkipNetwork, GatePolicy]):
    """Runs each block on the samples whose gate wants it; the others go around.

    Args:
        network: The network; it is put in evaluation mode.
        policy: How likely a gate must be, or what :func:`~offramp.calibrate` chose; one half
            if None, as the gates were trained.
    Raises:
        InvalidArgumentError: If the network or the policy is of another kind.
    """

    def __init__(self, network: SkipNetwork, policy: GatePolicy | Choice | None = None) -> None:
        self.network, self.policy = settled(network, policy, SkipNetwork, GatePolicy(), "add_gates")
        self._costs_by_size: dict[Hashable, SkipCosts] = {}

    @torch.no_grad()
    def run(self, *inputs: Given) -> AdaptiveResult[Tensor]:
        """Answer a batch.

        Args:
            inputs: The network's input, with the batch axis first, on its device, or a dict with
                it.
        Returns:
            Logits, the largest class probability, MACs and blocks run of each sample, in the
            order of the batch; every sample leaves by the only exit.
        Raises:
            ShapeError: If the network cannot take the inputs.
            InvalidArgumentError: If they are of the wrong kind.
        """
        if self.network.training:  # a caller may have trained it since
            self.network.eval()
        given = as_inputs(inputs, self.network)
        with explained(given, self.network.input_specs):
            (images,) = given
            x = self.network.stem(images)
            if x.data_ptr() == images.data_ptr():  # a stem that does nothing: blocks write on x
                x = x.clone()
            x, blocks_BG = self._run_blocks(x)
            logits_BC = self.network.head(x)
        return AdaptiveResult(
            output=logits_BC,
            exit_index=torch.zeros(len(images), dtype=torch.int64, device=images.device),
            confidence=max_probability_confidence(logits_BC),
            macs=self._costs(images).macs(blocks_BG),
            blocks=blocks_BG,
        )

    def _run_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        network, threshold = self.network, self.policy.threshold
        run_one_or_many = self._run_one if len(x) == 1 else self._run_many
        state: GateState = ()
        ran = []
        for index in range(network.num_gates):
            probability_B, state = network.ask(index, x, state)
            run_B = runs_block(probability_B, threshold)
            x = run_one_or_many(index, x, run_B)
            ran.append(run_B)
        return x, torch.stack(ran, 1)

    def _run_one(self, index: int, x: Tensor, run_B: Tensor) -> Tensor:
        """A single sample needs no indexing: the block runs or does not."""
        if bool(run_B):
            return self.network.run_block(index, x)
        return self.network.skip_block(index, x)

    def _run_many(self, index: int, x: Tensor, run_B: Tensor) -> Tensor:
        """Run the block on those that want it, and put what comes out back in its place."""
        rows = run_B.nonzero()[:, 0]  # the one wait for the device at this gate
        if len(rows) == len(x):
            return self.network.run_block(index, x)
        if len(rows) == 0:
            return self.network.skip_block(index, x)
        (wanting,) = take_samples((x,), rows)
        ran = self.network.run_block(index, wanting)
        if ran.shape[1:] == x.shape[1:]:  # going around changes nothing
            return x.index_copy_(0, rows, ran)
        others = (~run_B).nonzero()[:, 0]
        (resting,) = take_samples((x,), others)
        both = torch.cat([ran, self.network.skip_block(index, resting)])
        (in_order,) = take_samples((both,), torch.cat([rows, others]).argsort())
        return in_order

    def _costs(self, images: Tensor) -> SkipCosts:
        size = images.shape[1:]
        if size not in self._costs_by_size:
            self._costs_by_size[size] = self.network.costs(images)
        return self._costs_by_size[size]


@torch.no_grad()
def gated_sum(network: SkipNetwork, threshold: float, inputs: Features) -> Reference:
    """Run every block, and mask those whose gate's probability is below a threshold."""
    expected = network(*inputs, at_threshold(threshold))
    return Reference(
        output=expected.logits,
        exit_index=torch.zeros_like(expected.action[:, 0], dtype=torch.int64),
        num_exits=1,
        work=expected.action.bool(),
        is_near=lambda: (expected.probability - threshold).abs() < DECISION_TOLERANCE,
    )


def _whole(network: SkipNetwork) -> tuple[MultiExitNetwork, MultiExitNetwork]:
    every_block = network.without_gates()
    return every_block, every_block


def _figures(evaluation: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    return [evaluation["blocks"]["saved"], *evaluation["blocks"]["run_rates"]], []


def _parts_table(evaluation: Mapping[str, Any]) -> list[str]:
    rates = enumerate(evaluation["blocks"]["run_rates"])
    rows = [f"| {index} | {percent(rate)} |" for index, rate in rates]
    return ["| gated block | samples that run it |", "|---|---|", *rows]


SKIP = Family(
    name="skip",
    words=Words(
        kind="networks that skip blocks",
        maker="add_gates",
        does="skips blocks",
        ability="skips blocks input by input",
        tag="skipnet",
        heading="Which blocks run",
        rule="A block runs where its gate's probability is at least {policy.threshold:.4f}.",
        use=(
            "print(result.output.argmax(-1), result.blocks.sum(1), result.macs)"
            "  # class, blocks and MACs run"
        ),
        share="gates",
        way="skipping",
        whole_network="the whole network",
        less="skipping blocks",
        less_metric="with blocks skipped",
        whole="every block run",
        whole_metric="with every block run",
    ),
    network=SkipNetwork,
    policy=GatePolicy,
    as_trained=GatePolicy(),
    runner=SkipRunner,
    reference=lambda network, policy, inputs: gated_sum(network, policy.threshold, inputs),
    whole=_whole,
    never=lambda policy: GatePolicy(0.0),
    thresholds=GatePolicy.tried,
    settings="gates",
    figures=_figures,
    parts_table=_parts_table,
)
