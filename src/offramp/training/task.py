"""The Lightning task that trains a network, and the one for a network of several exits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from offramp.errors import TrainingDivergedError
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.routing.halting import HaltingNetwork
from offramp.routing.skip import SkipNetwork
from offramp.training.config import FitConfig
from offramp.training.data import epoch_seed
from offramp.training.labels import check_labels
from offramp.training.losses import joint_loss, weights_in_epoch
from offramp.training.regimes import balanced_outputs, set_training_mode
from offramp.training.samples import explained_data, read_batch
from offramp.training.schedules import cosine_factor

ACCURACY_METRIC = "accuracy_exit_{}"
"""Name of the logged calibration accuracy of an exit."""


class Task(LightningModule):
    """Trains a network in place and reports each exit's accuracy.

    Args:
        network: The network to train.
        config: How to train it.
    """

    num_exits = 1
    network: MultiExitNetwork | SkipNetwork | HaltingNetwork

    def __init__(
        self, network: MultiExitNetwork | SkipNetwork | HaltingNetwork, config: FitConfig
    ) -> None:
        super().__init__()
        self.network = network
        self.config = config

    @abstractmethod
    def loss(self, inputs: Features, labels_B: Tensor) -> Tensor:
        """The loss of a batch; labels are not checked yet."""

    @abstractmethod
    def answers(self, inputs: Features) -> Sequence[Tensor]:
        """Each exit's logits for a batch that judges."""

    def set_training_mode(self) -> None:
        """Put the network in training mode."""
        self.network.train()

    def on_train_epoch_start(self) -> None:
        """Seed the epoch for a DataLoader of the user's own; EpochSampler does it for ours."""
        self.set_training_mode()  # a callback may have run it early, in evaluation mode
        seed = epoch_seed(self.config.seed, self.current_epoch)
        torch.manual_seed(seed + self.global_rank)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Compute the loss of a batch."""
        inputs, labels_B = read_batch(batch, self.network)
        with explained_data(inputs, self.network):
            loss = self.loss(inputs, labels_B)
        if not loss.isfinite():
            raise TrainingDivergedError(
                f"The training loss is {loss.item()} in epoch {self.current_epoch + 1}: training "
                "has diverged. Use a smaller learning rate (--set learning_rate=...), and check "
                "that the inputs are finite."
            )
        num_samples = len(labels_B)
        self.log(
            "train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=num_samples
        )
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start counting; anew, since a tensor made earlier is shared by spawned processes."""
        self._correct_K = torch.zeros(self.num_exits)
        self._num_validated = 0

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Count each exit's correct answers on a batch."""
        inputs, labels_B = read_batch(batch, self.network)
        with explained_data(inputs, self.network):
            outputs = self.answers(inputs)
        check_labels(labels_B, num_classes=outputs[-1].shape[-1])
        correct = [(logits_BC.argmax(-1) == labels_B).sum() for logits_BC in outputs]
        self._correct_K += torch.stack(correct).cpu()
        self._num_validated += len(labels_B)

    def on_validation_epoch_end(self) -> None:
        """Log each exit's accuracy."""
        for k, correct in enumerate(self._correct_K.tolist()):
            self.log(
                ACCURACY_METRIC.format(k),
                correct / max(self._num_validated, 1),
                rank_zero_only=True,
            )

    def configure_optimizers(self) -> Any:
        """Build the optimiser and its schedule, a step an epoch."""
        config = self.config
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                groups, lr=config.learning_rate, momentum=0.9, nesterov=True
            )
        elif config.optimizer == "adam":
            optimizer = torch.optim.Adam(groups, lr=config.learning_rate)
        else:
            optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer)}}

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate over the epochs: a cosine to zero, after a rise if there is one."""
        epochs, warmup_epochs = self.config.epochs, self.config.warmup_epochs
        if not warmup_epochs:
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        factor = partial(cosine_factor, num_epochs=epochs, warmup_epochs=warmup_epochs)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class MultiExitTask(Task):
    """Trains every exit at once.

    Args:
        network: The network to train, in place.
        config: How to train it.
    """

    network: MultiExitNetwork

    def __init__(self, network: MultiExitNetwork, config: FitConfig) -> None:
        super().__init__(network, config)
        self.num_exits = network.num_exits

    def loss_weights(self, epoch: int) -> tuple[float, ...]:
        """Loss weight of each exit in an epoch.

        Args:
            epoch: Number of the epoch, from 0.
        Returns:
            One weight per exit.
        """
        return weights_in_epoch(
            self.config.loss_weights or (1.0,) * self.network.num_exits,
            epoch=epoch,
            backbone_epochs=self.config.backbone_epochs,
            ramp_epochs=self.config.ramp_epochs,
        )

    def set_training_mode(self) -> None:
        """See :func:`~offramp.training.regimes.set_training_mode`."""
        set_training_mode(self.network, is_frozen=self.config.freeze_backbone)

    def loss(self, inputs: Features, labels_B: Tensor) -> Tensor:
        """The joint loss."""
        outputs = self._outputs(inputs)
        check_labels(labels_B, num_classes=outputs[-1].shape[-1])
        return joint_loss(
            outputs,
            labels_B,
            weights=self.loss_weights(self.current_epoch),
            label_smoothing=self.config.label_smoothing,
            distillation=self.config.distillation,
        )

    def answers(self, inputs: Features) -> tuple[Tensor, ...]:
        """Every exit's logits."""
        outputs: tuple[Tensor, ...] = self.network(*inputs)
        return outputs

    def _outputs(self, inputs: Features) -> tuple[Tensor, ...]:
        config = self.config
        if config.gradient_equilibrium and self.current_epoch >= config.backbone_epochs:
            return balanced_outputs(self.network, *inputs)
        outputs: tuple[Tensor, ...] = self.network(*inputs, detach=config.detach)
        return outputs
