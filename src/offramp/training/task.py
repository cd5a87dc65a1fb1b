"""The Lightning task that trains a multi-exit network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from offramp.errors import DataError, InvalidArgumentError
from offramp.model.multi_exit import MultiExitNetwork
from offramp.training.data import epoch_seed
from offramp.training.losses import joint_loss

ACCURACY_METRIC = "accuracy_exit_{}"
"""Name of the logged calibration accuracy of an exit."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How to train. The defaults suit a small network trained from scratch.

    Attributes:
        epochs: Passes over the training data, at least 1.
        batch_size: Samples a step; ignored where a DataLoader is given.
        optimizer: adam, adamw or sgd (momentum 0.9, Nesterov).
        learning_rate: At the start; decays to zero over all epochs by a cosine, a step an epoch.
        weight_decay: On weight matrices and kernels, not on biases and norms.
        loss_weights: One per exit; all 1 if None.
        detach: Let only the final exit train the stages.
        backbone_epochs: Mixed training: so many first epochs train the final exit only, then all.
        label_smoothing: Share of the target spread over all classes, in [0, 1).
        distillation: Share of the early exits' loss that comes from the final exit, in [0, 1].
        class_balance: For test data whose classes are equally likely while those of train are
            not: "sampling" draws every class as often, which repeats samples of rare classes;
            "loss" draws samples as they are and puts the class frequencies into the loss.
        seed: Of the order of samples, of augmentation and of dropout.
        device: cpu, cuda, or auto (cuda where there is one).
        devices: Processes that train together (DDP), at least 1.
    """

    epochs: int = 10
    batch_size: int = 256
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    learning_rate: float = 0.003
    weight_decay: float = 0.01
    loss_weights: tuple[float, ...] | None = None
    detach: bool = False
    backbone_epochs: int = 0
    label_smoothing: float = 0.0
    distillation: float = 0.0
    class_balance: Literal["none", "sampling", "loss"] = "none"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1

    def __post_init__(self) -> None:
        checks = {
            "epochs": (self.epochs >= 1, "an int of at least 1"),
            "batch_size": (self.batch_size >= 1, "an int of at least 1"),
            "optimizer": (self.optimizer in ("adam", "adamw", "sgd"), "adam, adamw or sgd"),
            "learning_rate": (self.learning_rate > 0, "a positive number"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "backbone_epochs": (
                0 <= self.backbone_epochs < self.epochs,
                f"an int in [0, {self.epochs - 1}], fewer than the epochs",
            ),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "distillation": (0 <= self.distillation <= 1, "in [0, 1]"),
            "class_balance": (
                self.class_balance in ("none", "sampling", "loss"),
                "none, sampling or loss",
            ),
            "device": (self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda"),
            "devices": (self.devices >= 1, "an int of at least 1"),
            "seed": (self.seed >= 0, "an int of at least 0"),
        }
        for name, (is_valid, expected) in checks.items():
            if not is_valid:
                raise InvalidArgumentError(
                    f"The {name!r} parameter must be {expected}. Got {getattr(self, name)!r}."
                )


class MultiExitTask(LightningModule):
    """Trains every exit at once and reports each exit's accuracy.

    Args:
        network: The network to train, in place.
        config: How to train it.
        class_prior_C: Share of each class in the training data, for ``class_balance="loss"``.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        config: FitConfig,
        class_prior_C: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("class_prior_C", class_prior_C, persistent=False)
        self.class_prior_C: Tensor | None
        self.network = network
        self.config = config

    def loss_weights(self, epoch: int) -> tuple[float, ...]:
        """Loss weight of each exit in an epoch.

        Args:
            epoch: Number of the epoch, from 0.
        Returns:
            One weight per exit; before ``backbone_epochs``, zero for all but the final one.
        """
        weights = self.config.loss_weights or (1.0,) * self.network.num_exits
        if epoch < self.config.backbone_epochs:
            return (*(0.0 for _ in weights[:-1]), weights[-1])
        return weights

    def on_train_epoch_start(self) -> None:
        """Seed the epoch, so that a resumed run draws what the unbroken one drew."""
        self.network.train()  # a callback may have run it early, in evaluation mode
        seed = epoch_seed(self.config.seed, self.current_epoch)
        torch.manual_seed(seed + self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Compute the joint loss of a batch."""
        inputs, labels_B = batch
        outputs = self.network(inputs, detach=self.config.detach)
        check_labels(labels_B, num_classes=outputs[-1].shape[-1])
        loss = joint_loss(
            outputs,
            labels_B,
            weights=self.loss_weights(self.current_epoch),
            label_smoothing=self.config.label_smoothing,
            distillation=self.config.distillation,
            class_prior_C=self.class_prior_C,
        )
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start counting; anew, since a tensor made earlier is shared by spawned processes."""
        self._correct_K = torch.zeros(self.network.num_exits)
        self._num_validated = 0

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Count each exit's correct answers on a batch."""
        inputs, labels_B = batch
        outputs = self.network(inputs)
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
        """Build the optimiser and its cosine schedule."""
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
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}


def check_labels(labels_B: Tensor, *, num_classes: int) -> None:
    """Refuse labels that the network has no output for.

    Args:
        labels_B: Classes, shape (B,), int64.
        num_classes: Outputs of the network.
    Raises:
        DataError: If a label is outside [0, num_classes - 1].
    """
    smallest, largest = (int(value) for value in labels_B.aminmax())
    if smallest < 0 or largest >= num_classes:
        wrong = smallest if smallest < 0 else largest
        raise DataError(
            f"Labels must be in [0, {num_classes - 1}], one per output of the network. "
            f"Got {wrong}. Check the data set, or build the network with more classes."
        )
