"""The Lightning task that trains a network of several exits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from offramp.data.label_range import check_labels
from offramp.errors import InvalidArgumentError
from offramp.model.multi_exit import Features, MultiExitNetwork
from offramp.training.losses import joint_loss, weights_in_epoch
from offramp.training.regimes import (
    balanced_outputs,
    frozen_backbone,
    head_parameters,
    set_training_mode,
)
from offramp.training.tasks.task import Task


class MultiExitTask(Task):
    """Trains every exit at once; see :class:`Task`, whose arguments it takes.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> task = MultiExitTask(network, FitConfig(epochs=5))  # doctest: +SKIP
        >>> Trainer(max_epochs=5).fit(task, train_loader, validation_loader)  # doctest: +SKIP
    """

    network: MultiExitNetwork
    takes = MultiExitNetwork

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

    def check_regimes(self) -> None:
        """Raise if the backbone is to be frozen and nothing else can be trained."""
        heads = head_parameters(self.network)
        if self.config.freeze_backbone and not any(p.requires_grad for p in heads):
            raise InvalidArgumentError(
                "'freeze_backbone' trains only the exits before the final one. This network has "
                f"{self.network.num_exits - 1} of them, without weights of their own to train: add "
                "exits, or train the backbone too."
            )

    def planned_optimizers(self) -> Any:
        """Build what ``configure_optimizers`` will give a Trainer, which freezes the backbone."""
        if not self.config.freeze_backbone:
            return self.configure_optimizers()
        with frozen_backbone(self.network):
            return self.configure_optimizers()

    def set_training_mode(self) -> None:
        """See :func:`~offramp.training.regimes.set_training_mode`."""
        set_training_mode(self.network, is_frozen=self.config.freeze_backbone)

    def configure_callbacks(self) -> list[Callback]:
        """Hold the backbone still, if the config says so, until the fit ends or breaks."""
        return [_FrozenBackbone()] if self.config.freeze_backbone else []

    def loss(self, inputs: Features, labels_B: Tensor) -> Tensor:
        """The joint loss."""
        outputs = self._outputs(inputs)
        check_labels(labels_B, num_classes=outputs[-1].shape[-1])
        return self._joint_loss(outputs, labels_B, self.loss_weights(self.current_epoch))

    def judging_loss(self, outputs: Sequence[Tensor], labels_B: Tensor) -> Tensor:
        """The joint loss with the full weights, so that epochs compare."""
        return self._joint_loss(outputs, labels_B, self.config.loss_weights)

    def _joint_loss(
        self,
        outputs: Sequence[Tensor],
        labels_N: Tensor,
        weights: Sequence[float] | None,
        class_weights_C: Tensor | None = None,
    ) -> Tensor:
        return joint_loss(
            outputs,
            labels_N,
            weights=weights,
            label_smoothing=self.config.label_smoothing,
            distillation=self.config.distillation,
            class_weights_C=class_weights_C,
            loss=self.own_loss,
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


class _FrozenBackbone(Callback):
    """Holds stages and final exit still while their task is fitted."""

    def __init__(self) -> None:
        self._frozen = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._frozen.enter_context(frozen_backbone(cast(MultiExitTask, pl_module).network))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._frozen.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._frozen.close()
