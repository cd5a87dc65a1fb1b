"""The Lightning task that trains a network that skips blocks, and its gates with it.

Shapes: ``B`` batch, ``G`` gates.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from offramp.data.label_range import check_labels
from offramp.model.multi_exit import Features
from offramp.routing.skip import (
    Choice,
    GatedOutput,
    SkipNetwork,
    at_threshold,
    sampled,
    straight_through,
)
from offramp.training.config import GateConfig
from offramp.training.schedules import two_cosines
from offramp.training.tasks.reinforce import hybrid_loss
from offramp.training.tasks.task import Task

_FINAL = 0.5
"""Threshold of the gates once they stand still."""
BLOCKS_METRIC = "blocks_run"
"""Name of the logged share of gated blocks that run on calibration data."""


class SkipTask(Task):
    """Trains by the labels with straight-through gates first, then by labels and reward.

    The last epochs may settle: the gates' weights change no more, what they say is done and not
    drawn, and the blocks learn to do with it. Their norms still follow the features.

    Args are those of :class:`~offramp.training.tasks.task.Task`.

    Reference: Wang et al. (2018), SkipNet, section 3.3: supervised pre-training, then hybrid
        reinforcement learning.
    """

    network: SkipNetwork
    takes = SkipNetwork

    _block_macs: tuple[int, ...] | None = None

    @property
    def gates(self) -> GateConfig:
        """Settings of the gates' training."""
        return self.config.gates or GateConfig()

    @property
    def first_reward_epoch(self) -> int:
        """The first epoch, from 0, of reinforcement learning."""
        return self.config.epochs - self.gates.reward_epochs

    @property
    def first_settled_epoch(self) -> int:
        """The first epoch, from 0, in which gates learn no more and are not drawn."""
        return self.config.epochs - self.gates.settled_epochs

    @property
    def _choice(self) -> Choice:
        """Mode of the gates in this epoch."""
        if self.current_epoch >= self.first_settled_epoch:
            return at_threshold(_FINAL)
        return sampled if self.current_epoch >= self.first_reward_epoch else straight_through

    def loss(self, inputs: Features, labels_B: Tensor) -> Tensor:
        """The supervised loss, or the hybrid one in the last epochs."""
        is_rewarded = self.first_reward_epoch <= self.current_epoch < self.first_settled_epoch
        output: GatedOutput = self.network(*inputs, self._choice)
        check_labels(labels_B, num_classes=output.logits.shape[-1])
        if not is_rewarded:
            return self.criterion(output.logits, labels_B)
        return hybrid_loss(
            output.logits,
            labels_B,
            output.probability,
            output.action,
            alpha=self.gates.alpha,
            policy_weight=self.gates.policy_weight,
            weights=self._reward_weights(inputs),
            run_target=self.gates.run_target,
            baseline=self.gates.baseline and len(labels_B) > 1,  # a last batch may hold one
            greedy=self._greedy(inputs) if self.gates.self_critical else None,
            supervised=self.gates.supervised,
        )

    @torch.no_grad()
    def _greedy(self, inputs: Features) -> tuple[Tensor, Tensor]:
        output: GatedOutput = self.network(*inputs, at_threshold(_FINAL))
        return output.logits, output.action

    def _reward_weights(self, inputs: Features) -> tuple[int, ...] | None:
        if self.gates.reward == "blocks":
            return None
        if self._block_macs is None:
            self._block_macs = self.network.costs(*inputs).block_macs
        return self._block_macs

    def answers(self, inputs: Features) -> tuple[Tensor, ...]:
        """The only exit's logits, blocks run where their gates say more than one half."""
        output: GatedOutput = self.network(*inputs)
        self._run_BG.append(output.action)
        return (output.logits,)

    def on_validation_epoch_start(self) -> None:
        """Start counting, blocks too."""
        super().on_validation_epoch_start()
        self._run_BG: list[Tensor] = []

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and share of blocks run."""
        super().on_validation_epoch_end()
        self.report(BLOCKS_METRIC, torch.cat(self._run_BG).mean())

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Two cosines to zero, of the supervised and the rewarded epochs; or one over all."""
        reward_rate = self.gates.reward_learning_rate
        if reward_rate is None:
            return super().schedule(optimizer)
        factor = partial(
            two_cosines,
            num_first=self.first_reward_epoch,
            num_second=self.gates.reward_epochs,
            second_factor=reward_rate / self.config.learning_rate,
            warmup_epochs=self.config.warmup_epochs,
        )
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
