"""The Lightning task that trains a network, of any family."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import MeanMetric, Metric

from offramp.data.batches import explained_data, read_batch
from offramp.data.images import epoch_seed
from offramp.data.label_range import check_labels
from offramp.errors import InvalidArgumentError, TrainingDivergedError, reason
from offramp.measure.outputs import LABELS, Outputs
from offramp.model.multi_exit import Features
from offramp.training.config import FitConfig
from offramp.training.config_checks import check_config
from offramp.training.schedules import cosine_factor
from offramp.zoo import Network

ACCURACY_METRIC = "accuracy_exit_{}"
"""Name of the logged accuracy of an exit on validation data."""

VAL_LOSS = "val_loss"
"""Name of the logged loss on validation data."""

MakeOptimizer = Callable[[list[nn.Parameter]], Any]
"""From the parameters to train to an optimizer, or to {"optimizer": ..., "lr_scheduler": ...}."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""From an exit's logits and the labels to a scalar."""

Metrics = Mapping[str, Metric | Callable[[Tensor, Tensor], Any]]
"""By name, a torchmetrics metric of logits and labels, or a function of them that says a number."""


class Task(LightningModule):
    """Trains a network in place: a ``LightningModule`` for ``fit`` or a ``Trainer`` of your own.

    It logs ``train_loss`` and, where there is validation data, ``val_loss``, each exit's
    ``accuracy_exit_k``, and each metric of your own as ``NAME_exit_k``. Override its hooks, such
    as ``configure_optimizers`` or ``loss``, as those of any ``LightningModule``.

    Args:
        network: The network to train.
        config: How to train it; ``FitConfig()`` if None. Of a ``Trainer`` of your own, epochs,
            device, devices, precision and gradient clipping are the Trainer's, batch size and
            order the loader's.
        optimizer: A function of the parameters to train, such as ``partial(SGD, lr=0.1)``, that
            returns what ``configure_optimizers`` does: an optimizer, or a dict of "optimizer" and
            "lr_scheduler". It replaces the config's optimizer, learning rate and schedule.
        loss: A function of an exit's logits and the labels that returns a scalar, instead of
            cross entropy.
        metrics: Metrics of your own by name: torchmetrics metrics of logits and labels, or
            functions of them that return a number, whose mean over the samples is logged.
    Raises:
        InvalidArgumentError: If the config does not suit the network, or a setting that the loss
            of your own would leave unused.
    """

    network: Network
    takes: type[nn.Module] = nn.Module
    """The networks that it trains."""
    outputs: Outputs = LABELS
    """The outputs of these networks."""

    def __init__(
        self,
        network: Network,
        config: FitConfig | None = None,
        *,
        optimizer: MakeOptimizer | None = None,
        loss: Loss | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        super().__init__()
        config = config or FitConfig()
        check_config(network, config)
        _check_own(config, optimizer=optimizer, loss=loss)
        if not isinstance(network, self.takes) or network.outputs is not self.outputs:
            raise InvalidArgumentError(
                f"{type(self).__name__} does not train this {type(network).__name__}: let "
                "make_task(network) choose the task."
            )
        self.check_metrics(metrics)
        self.network = network
        self.config = config
        self.check_regimes()
        self.num_exits = network.num_exits
        self.own_optimizer = optimizer
        self.own_loss = loss
        self._own_metrics = dict(metrics or {})
        self.metrics = nn.ModuleDict(
            {
                f"{name}_exit_{k}": metric.clone() if isinstance(metric, Metric) else MeanMetric()
                for name, metric in self._own_metrics.items()
                for k in range(self.num_exits)
            }
        )

    def check_metrics(self, metrics: Metrics | None) -> None:
        """Raise if metrics of your own cannot be logged; where a sample has a class, all can."""

    def check_regimes(self) -> None:
        """Raise if the config trains several exits, where the network has one and saves inside."""
        names = (
            *("loss_weights", "detach", "freeze_backbone", "gradient_equilibrium"),
            *("backbone_epochs", "ramp_epochs", "distillation"),
        )
        for name in names:
            if getattr(self.config, name):
                raise InvalidArgumentError(
                    f"The {name!r} parameter is about several exits. This network has one, and "
                    f"saves inside: leave it out. Got {getattr(self.config, name)!r}."
                )

    @abstractmethod
    def loss(self, inputs: Features, labels_B: Tensor) -> Tensor:
        """The loss of a batch; labels are not checked yet."""

    @abstractmethod
    def answers(self, inputs: Features) -> Sequence[Tensor]:
        """Each exit's logits for a batch that judges."""

    def criterion(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """The loss of one exit: your own, or cross entropy."""
        if self.own_loss is not None:
            return self.own_loss(logits_BC, labels_B)
        return F.cross_entropy(logits_BC, labels_B, label_smoothing=self.config.label_smoothing)

    def judging_loss(self, outputs: Sequence[Tensor], labels_B: Tensor) -> Tensor:
        """The loss of answers to validation data."""
        return self.criterion(outputs[-1], labels_B)

    def set_training_mode(self) -> None:
        """Put the network in training mode."""
        self.network.train()

    def setup(self, stage: str) -> None:
        """Make sure that the schedule of the learning rate is as long as the training."""
        epochs = self.trainer.max_epochs
        has_own = self.own_optimizer is not None or (
            type(self).configure_optimizers is not Task.configure_optimizers
        )
        epochs = -1 if epochs is None else epochs  # a Trainer without end
        if stage == "fit" and not has_own and not 0 <= epochs <= self.config.epochs:
            raise InvalidArgumentError(
                f"The learning rate falls to zero over the {self.config.epochs} epochs of the "
                f"config. Got a Trainer of max_epochs={epochs}: give FitConfig(epochs=...) and the "
                "Trainer the same number."
            )

    def on_train_epoch_start(self) -> None:
        """Seed the epoch for a DataLoader of the user's own; EpochSampler does it for ours."""
        self.set_training_mode()  # a callback may have run it early, in evaluation mode
        seed = epoch_seed(self.config.seed, self.current_epoch)
        torch.manual_seed(seed + self.global_rank)

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Compute the loss of a batch."""
        inputs, labels_B = read_batch(batch, self.network)
        with self._norms_for(len(labels_B), batch_index), explained_data(inputs, self.network):
            loss = self.loss(inputs, labels_B)
        if loss.ndim:
            raise InvalidArgumentError(
                f"A loss must be a scalar. Got one of shape {tuple(loss.shape)}: take its mean."
            )
        if not loss.isfinite():
            raise TrainingDivergedError(
                f"The training loss is {loss.item()} in epoch {self.current_epoch + 1}: training "
                "has diverged. Use a smaller learning_rate, and check that the inputs are finite."
            )
        self.log("train_loss_step", loss, on_step=True, on_epoch=False, prog_bar=True)
        # Of this process: a mean over all would wait for them wherever one alone asks for it.
        self.log(
            "train_loss",
            loss,
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(labels_B),
        )
        return loss

    @contextmanager
    def _norms_for(self, num_samples: int, batch_index: int) -> Iterator[None]:
        """Let BatchNorm use its running statistics on a batch of one, which has no variance."""
        norms = [
            module
            for module in (self.network.modules() if num_samples == 1 else ())
            if isinstance(module, _BatchNorm) and module.training
        ]
        if norms and batch_index == 0:
            raise InvalidArgumentError(
                "BatchNorm needs batches of two samples or more to train on. Got a first batch of "
                "one: use a larger batch_size, or more samples."
            )
        for norm in norms:
            norm.eval()
        try:
            yield
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InvalidArgumentError(
                f"A normalisation over the batch cannot be trained on this batch of {num_samples} "
                f"({reason(error)}). Use a batch_size that leaves no single sample over, or "
                "DataLoader(..., drop_last=True)."
            ) from error
        finally:
            for norm in norms:
                norm.train()

    def on_validation_epoch_start(self) -> None:
        """Start counting; anew, since a tensor made earlier is shared by spawned processes."""
        self._correct_K = torch.zeros(self.num_exits, dtype=torch.int64)
        self._loss_sum = torch.zeros(())
        self._num_validated = 0
        for metric in self._metrics_now.values():
            metric.reset()

    def validation_step(self, batch: Any, batch_index: int) -> None:
        """Count each exit's correct answers on a batch."""
        inputs, labels_B = read_batch(batch, self.network)
        with explained_data(inputs, self.network):
            outputs = self.answers(inputs)
        check_labels(labels_B, num_classes=outputs[-1].shape[-1])
        correct = [(logits_BC.argmax(-1) == labels_B).sum() for logits_BC in outputs]
        self._correct_K += torch.stack(correct).cpu()
        self._count_loss(self.judging_loss(outputs, labels_B), len(labels_B))
        self._update_metrics(outputs, labels_B)

    @property
    def _metrics_now(self) -> dict[str, Metric]:
        """The metrics that are counting, by the name that is logged."""
        return {name: metric for name, metric in self.metrics.items() if isinstance(metric, Metric)}

    def _count_loss(self, loss: Tensor, num_samples: int) -> None:
        self._loss_sum += num_samples * loss.float().cpu()
        self._num_validated += num_samples

    def _update_metrics(self, outputs: Sequence[Tensor], labels_B: Tensor) -> None:
        for name, own in self._own_metrics.items():
            for k, logits_BC in enumerate(outputs):
                metric = self._metrics_now[f"{name}_exit_{k}"]
                if isinstance(own, Metric):
                    metric.update(logits_BC, labels_B)
                else:
                    metric.update(own(logits_BC, labels_B), weight=len(labels_B))

    def on_validation_epoch_end(self) -> None:
        """Log the loss, each exit's accuracy, and metrics of the user's own."""
        num_validated = self.report_loss()
        for k, correct in enumerate(self.over_processes(self._correct_K).tolist()):
            self.report(ACCURACY_METRIC.format(k), correct / num_validated)
        for name, metric in self._metrics_now.items():
            self.report(name, metric.compute())

    def report_loss(self) -> int:
        """Log the loss on validation data, and count the samples that it is a mean of."""
        num_validated = max(int(self.over_processes(torch.tensor(self._num_validated))), 1)
        self.report(VAL_LOSS, self.over_processes(self._loss_sum).item() / num_validated)
        return num_validated

    @property
    def _has_peers(self) -> bool:
        """True if several processes train; none does without a Trainer."""
        return self._trainer is not None and self.trainer.world_size > 1

    def over_processes(self, counts: Tensor) -> Tensor:
        """Counts summed over the processes that train together.

        Each may have counted its own share of the samples, or all of them: shares of a sum are
        the same.
        """
        if not self._has_peers:
            return counts
        summed = self.trainer.strategy.reduce(counts.to(self.device), reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed.cpu()

    def report(self, name: str, value: Any) -> None:
        """Log a figure of validation data, the same in every process."""
        if isinstance(value, Tensor) and value.numel() != 1:
            raise InvalidArgumentError(
                f"The metric {name!r} must be one number. Got {tuple(value.shape)} of them: take "
                "their mean, or name a metric for each."
            )
        self.log(name, value, prog_bar=name == VAL_LOSS, sync_dist=self._has_peers)

    def configure_optimizers(self) -> Any:
        """Build the optimiser and its schedule, a step an epoch; or the user's own."""
        config = self.config
        parameters = [p for p in self.parameters() if p.requires_grad]  # a loss may have some too
        if self.own_optimizer is not None:
            return _checked(self.own_optimizer(parameters))
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

    def planned_optimizers(self) -> Any:
        """Build what ``configure_optimizers`` will give a Trainer."""
        return self.configure_optimizers()

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate over the epochs: a cosine to zero, after a rise if there is one."""
        epochs, warmup_epochs = self.config.epochs, self.config.warmup_epochs
        if not warmup_epochs:
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        factor = partial(cosine_factor, num_epochs=epochs, warmup_epochs=warmup_epochs)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _check_own(config: FitConfig, *, optimizer: object, loss: object) -> None:
    for name, given in (("optimizer", optimizer), ("loss", loss)):
        if given is not None and not callable(given):
            raise InvalidArgumentError(
                f"The {name!r} parameter must be a function, such as partial(torch.optim.SGD, "
                f"lr=0.1) or torch.nn.CrossEntropyLoss(). Got {type(given).__name__}."
            )
    if loss is None:
        return
    for name in ("label_smoothing", "class_weights"):
        if getattr(config, name):
            raise InvalidArgumentError(
                f"The {name!r} parameter is about cross entropy, which the loss of your own "
                "replaces: leave it out."
            )
    if config.gates is not None and config.gates.reward_epochs:
        raise InvalidArgumentError(
            "The 'loss' parameter cannot replace the cross entropy that gates are rewarded by: "
            "leave it out, or train with reward_epochs=0."
        )


def _checked(made: Any) -> Any:
    found = made.get("optimizer") if isinstance(made, Mapping) else made
    if not isinstance(found, torch.optim.Optimizer):
        raise InvalidArgumentError(
            "The 'optimizer' function must return an optimizer, or a dict of 'optimizer' and "
            f"'lr_scheduler'. Got {type(made).__name__}."
        )
    return made
