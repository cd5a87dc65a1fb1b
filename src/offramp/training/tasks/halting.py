"""The Lightning task that trains a transformer, and then lets its tokens halt.

Shapes: ``B`` batch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from offramp.data.label_range import check_labels
from offramp.model.multi_exit import Features
from offramp.routing.halting import HaltingNetwork, HaltingOutput
from offramp.training.config import HaltingConfig
from offramp.training.schedules import two_cosines
from offramp.training.tasks.ponder import ponder_loss, prior_loss
from offramp.training.tasks.task import Task

TOKENS_METRIC = "tokens_run"
"""Name of the logged share of tokens that run, the mean over layers and calibration data."""


class HaltingTask(Task):
    """Trains the plain network first, then by labels, pondering and prior with halting tokens.

    Args are those of :class:`~offramp.training.tasks.task.Task`.

    Reference: Yin et al. (2022), A-ViT: a network trained plain is fine-tuned with halting.
    """

    network: HaltingNetwork
    takes = HaltingNetwork

    @property
    def halting(self) -> HaltingConfig:
        """Settings of the training in which tokens learn to halt."""
        return self.config.halting or HaltingConfig()

    @property
    def first_halting_epoch(self) -> int:
        """The first epoch, from 0, in which tokens halt."""
        return self.config.epochs - self.halting.halting_epochs

    @property
    def target_depth(self) -> float:
        """Layers after which tokens shall halt, about."""
        target = self.halting.target_depth
        return self.network.num_layers / 2 if target is None else target

    @property
    def is_halting(self) -> bool:
        """True if tokens halt in this epoch."""
        return self.current_epoch >= self.first_halting_epoch

    def loss(self, inputs: Features, labels_B: Tensor) -> Tensor:
        """Cross entropy; in the last epochs pondering and the prior as well."""
        if not self.is_halting:
            return self._checked_loss(self.network.plain()(*inputs), labels_B)
        output: HaltingOutput = self.network(*inputs)
        return (
            self._checked_loss(output.logits, labels_B)
            + self.halting.ponder_weight * ponder_loss(output)
            + self.halting.prior_weight * prior_loss(output, self.target_depth)
        )

    def _checked_loss(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        check_labels(labels_B, num_classes=logits_BC.shape[-1])
        return self.criterion(logits_BC, labels_B)

    def answers(self, inputs: Features) -> tuple[Tensor, ...]:
        """The only exit's logits: the plain network's as long as no token halts."""
        if not self.is_halting:
            return (self.network.plain()(*inputs),)
        output: HaltingOutput = self.network(*inputs)
        tokens_B, valid_B = output.tokens.sum(1), output.valid.sum(1)
        self._share_run_B.append(tokens_B / (valid_B * self.network.num_layers))
        return (output.logits,)

    def on_validation_epoch_start(self) -> None:
        """Start counting, tokens too."""
        super().on_validation_epoch_start()
        self._share_run_B: list[Tensor] = []

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and, where tokens halt, the share of them that run."""
        super().on_validation_epoch_end()
        if self._share_run_B:
            self.report(TOKENS_METRIC, torch.cat(self._share_run_B).mean())

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Two cosines to zero, one after the other: of the plain network and of halting."""
        factor = partial(
            two_cosines,
            num_first=self.first_halting_epoch,
            num_second=self.halting.halting_epochs,
            second_factor=self.halting.halting_learning_rate / self.config.learning_rate,
            warmup_epochs=self.config.warmup_epochs,
        )
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
