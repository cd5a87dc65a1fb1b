"""The checkpoint that a run goes on from: written every epoch, checked before it is read."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from offramp.artifacts import SCHEMA_VERSION
from offramp.errors import ArtifactError, reason
from offramp.training.config import FitConfig
from offramp.training.tasks.task import Task

LAST_CHECKPOINT = "last.ckpt"

_SCHEMA_KEY = "offramp_schema_version"
_SETTINGS_KEY = "offramp_settings"
_MONITORED_KEY = "offramp_monitored"
_UNREADABLE = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    pickle.UnpicklingError,
)
_NO_SETTINGS = ("device", "devices", "precision")
"""Fields of FitConfig that say where to train; a run may go on elsewhere."""


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` at the end of every epoch, whole or not at all.

    A ``Checkpoint``, so that Lightning calls it after every callback whose state it holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._monitored: dict[str, float] = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say which version wrote it, and what shaped the training."""
        checkpoint[_SCHEMA_KEY] = SCHEMA_VERSION
        checkpoint[_MONITORED_KEY] = {
            each.monitor: float(trainer.callback_metrics[each.monitor])
            for each in trainer.lr_scheduler_configs
            if each.reduce_on_plateau and each.monitor in trainer.callback_metrics
        }
        if isinstance(pl_module, Task):
            checkpoint[_SETTINGS_KEY] = settings_of(pl_module)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the figures that schedulers go by."""
        self._monitored = checkpoint.get(_MONITORED_KEY, {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for the step of ``ReduceLROnPlateau``, which Lightning takes after it saves."""
        for each in trainer.lr_scheduler_configs:
            scheduler = each.scheduler
            if isinstance(scheduler, ReduceLROnPlateau) and each.monitor in self._monitored:
                scheduler.step(self._monitored[each.monitor])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it."""
        temporary = self.folder / f".{LAST_CHECKPOINT}.partial"
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            temporary.replace(self.folder / LAST_CHECKPOINT)


def settings_of(task: Task) -> dict[str, Any]:
    """Describe all that shapes training but the data and the network, in plain values."""
    settings = {k: v for k, v in asdict(task.config).items() if k not in _NO_SETTINGS}
    if task.own_optimizer is not None:
        made = task.planned_optimizers()
        parts = [made] if isinstance(made, Optimizer) else [*made.values()]
        names = [_class_in(part) for part in parts]
        settings["optimizer"] = " and ".join(name for name in names if name is not None)
        # How long its schedule is, and how fast it learns, the config does not say.
        for name in ("epochs", "learning_rate", "weight_decay", "warmup_epochs"):
            del settings[name]
    return settings


def _class_in(part: Any) -> str | None:
    if isinstance(part, Mapping):
        part = part.get("scheduler")
    return None if part is None or isinstance(part, str) else type(part).__name__


def check_checkpoint(path: Path, network: nn.Module, task: Task | None = None) -> Path:
    """Make sure that a checkpoint is whole and of this training, before training touches it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content[_SCHEMA_KEY]
        state = content["state_dict"].items()
        shapes = {name: t.shape for name, t in state if name.startswith("network.")}
        num_done = content.get("epoch", -1) + 1
    except _UNREADABLE as error:
        raise ArtifactError(
            f"The checkpoint {path} is damaged or not Offramp's "
            f"({reason(error)}). "
            "Delete it to start this run again from the first epoch."
        ) from error
    if version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version}; this Offramp reads up to {SCHEMA_VERSION}. "
            "Upgrade Offramp: pip install --upgrade offramp"
        )
    if shapes != {f"network.{name}": t.shape for name, t in network.state_dict().items()}:
        raise ArtifactError(
            f"The checkpoint {path} is of another network. Resume with the settings the run "
            "was started with, or choose another folder."
        )
    if task is not None:
        _check_settings(path, content, task)
        if num_done > task.config.epochs:
            raise ArtifactError(
                f"The checkpoint {path} has {num_done} epochs done, more than the "
                f"{task.config.epochs} asked for. Ask for more, or choose another folder."
            )
    return path


def _check_settings(path: Path, content: Mapping[str, Any], task: Task) -> None:
    wanted = settings_of(task)
    found = content.get(_SETTINGS_KEY, wanted)  # versions before 0.2 wrote none
    for name in ("optimizer", *wanted):
        value = found.get(name, getattr(FitConfig(), name))
        if value != wanted[name]:
            raise ArtifactError(
                f"The checkpoint {path} was trained with {name}={value!r}, and this training has "
                f"{name}={wanted[name]!r}. Resume with the settings the run was started with, or "
                "choose another folder."
            )
    made = task.planned_optimizers()
    optimizer = made if isinstance(made, Optimizer) else made["optimizer"]
    planned = optimizer.state_dict()["param_groups"]
    held = content.get("optimizer_states", [{"param_groups": planned}])[0]["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (held, planned)]
    names = [{name for group in groups for name in group} for groups in (held, planned)]
    if sizes[0] != sizes[1] or not names[1] <= names[0]:
        raise ArtifactError(
            f"The checkpoint {path} is of a training with another optimizer than this "
            f"{type(optimizer).__name__}, or of other parameters to train. Resume with the "
            "settings the run was started with, or choose another folder."
        )
