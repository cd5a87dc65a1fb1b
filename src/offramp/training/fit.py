"""Training a network with Lightning: ``fit`` and what it writes."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from offramp.data.batches import batches_of, checked_loader, read_batch, samples_of
from offramp.data.images import Batches, EpochSampler, make_loader, split_off_calibration
from offramp.errors import InvalidArgumentError
from offramp.families import family_of
from offramp.measure.outputs import LABELS, MAPS
from offramp.training.checkpoint_choice import note_choice, read_choice, write_choice
from offramp.training.config import FitConfig
from offramp.training.history import METRICS_FILE, EpochReport, History
from offramp.training.last_checkpoint import LAST_CHECKPOINT, LastCheckpoint, check_checkpoint
from offramp.training.processes import (
    EveryProcess,
    Spawned,
    own_errors,
    quiet_lightning,
    quiet_torch,
)
from offramp.training.tasks.exits import MultiExitTask
from offramp.training.tasks.halting import HaltingTask
from offramp.training.tasks.maps import DenseTask
from offramp.training.tasks.skip import SkipTask
from offramp.training.tasks.task import VAL_LOSS, Loss, MakeOptimizer, Metrics, Task
from offramp.zoo import Network

Data = Dataset[Any] | DataLoader[Any]
"""Pairs of (input, class), or a loader of batches of them."""

Loggers = Logger | Sequence[Logger] | bool | None
"""As Lightning's Trainer takes them; None for those that fit makes itself."""


def fit(
    network: Network | Task,
    train: Data,
    calibration: Data | None = None,
    config: FitConfig | None = None,
    *,
    validation: Data | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    callbacks: Callback | Sequence[Callback] = (),
    logger: Loggers = None,
    progress: bool = True,
) -> History:
    """Train a network in place: every exit at once, gates that skip blocks, tokens that halt.

    With a ``folder``, every epoch ends with a checkpoint (``last.ckpt``), a line in
    ``metrics.jsonl``, and Lightning's logs under ``logs/``. Given a Dataset, order, augmentation
    and dropout depend on the seed and the epoch alone: a run that was killed and resumed ends with
    the weights of the unbroken run (same device and number of threads). BatchNorm uses its running
    statistics on a last batch of one sample.

    Args:
        network: The network to train, left in evaluation mode; or a task that holds it, from
            ``make_task``, for an optimizer, loss or metrics of your own.
        train: Pairs of (input, class), or a loader of batches of them; the input is a tuple of
            tensors where the network takes several.
        calibration: Held-out pairs to report on after every epoch, where there is no validation
            data. If a callback or scheduler goes by such a figure, no guarantee may rest on these
            samples: that is noted on the network and in the folder.
        config: How to train; ``FitConfig()`` if None. Its ``validation_share`` cuts validation
            data from train.
        validation: Pairs to report on instead: ``val_loss``, ``accuracy_exit_k``, metrics.
        folder: An existing folder for checkpoint and logs; nothing is written if None.
        resume: Go on from the folder's checkpoint, if there is one.
        callbacks: Lightning callbacks; a progress bar among them replaces fit's own.
        logger: As Lightning's Trainer takes it; if None, CSV and TensorBoard in the folder.
        progress: Whether to print a line an epoch, and show a bar in a terminal.
    Returns:
        A record of every epoch, those before it was resumed too.
    Raises:
        InvalidArgumentError: If config, callbacks or logger do not suit the network, the data or
            this machine.
        DataError: If a label is outside the network's classes, or there is no sample.
        TrainingDivergedError: If the loss is no longer finite; a folder keeps the last checkpoint.
        ArtifactError: If the checkpoint to resume from is damaged, or of another network or
            training.
    """
    task = _task_of(network, config)
    own_callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
    _check_lightning(own_callbacks, logger)
    reports = _Reports(callbacks=own_callbacks, logger=logger, progress=progress)
    return _fit(
        task, _Sets.of(train, calibration, validation, task.config), folder, resume, reports
    )


TASKS: dict[str, type[Task]] = {
    "exits": MultiExitTask,
    "skip": SkipTask,
    "halting": HaltingTask,
}
"""From a family's name to what trains its networks where a sample has a class."""

_TASKS_BY_OUTPUTS: dict[str, dict[str, type[Task]]] = {
    LABELS.name: TASKS,
    MAPS.name: {"exits": DenseTask},
}


def make_task(
    network: Network,
    config: FitConfig | None = None,
    *,
    optimizer: MakeOptimizer | None = None,
    loss: Loss | None = None,
    metrics: Metrics | None = None,
) -> Task:
    """Make the Lightning task that trains a network, for ``fit`` or a Trainer of your own.

    Args:
        network: The network to train.
        config: How to train it; ``FitConfig()`` if None. A Trainer of your own has its own epochs,
            devices, precision and gradient clipping, and its loader the batch size and order.
        optimizer: A function of the parameters to train that returns an optimizer, or a dict of
            "optimizer" and "lr_scheduler" as ``configure_optimizers`` does. It replaces the
            config's optimizer, learning rate and schedule.
        loss: A function of an exit's logits and the labels that returns a scalar, instead of
            cross entropy.
        metrics: By name, torchmetrics metrics of logits and labels, or functions of them that
            return a number, whose mean over the samples counts. Logged as ``NAME_exit_k``.
    Returns:
        A ``LightningModule``: :class:`MultiExitTask`, :class:`DenseTask`, :class:`SkipTask` or
        :class:`HaltingTask`, which can be subclassed too.
    Raises:
        InvalidArgumentError: If the config does not suit the network.
    Example:
        >>> from functools import partial
        >>> from torch.optim import SGD
        >>> task = make_task(network, optimizer=partial(SGD, lr=0.1))  # doctest: +SKIP
        >>> Trainer(max_epochs=10).fit(task, train_loader, validation_loader)  # doctest: +SKIP
    """
    family = family_of(network)
    task = _TASKS_BY_OUTPUTS[network.outputs.name][family.name]
    return task(network, config, optimizer=optimizer, loss=loss, metrics=metrics)


def _task_of(network: Network | Task, config: FitConfig | None) -> Task:
    if not isinstance(network, Task):
        return make_task(network, config)
    if config is not None and config != network.config:
        raise InvalidArgumentError(
            "A task has its own config, and another was given to fit. Give it to make_task alone."
        )
    return network


@dataclass(frozen=True)
class _Reports:
    """Callbacks, loggers and progress bar as the user wants them."""

    callbacks: list[Callback]
    logger: Loggers
    progress: bool

    @property
    def has_bar(self) -> bool:
        return any(isinstance(callback, ProgressBar) for callback in self.callbacks)

    @property
    def prints(self) -> bool:
        return self.progress and not self.has_bar

    @property
    def is_watched(self) -> bool:
        """True if a bar of ours is to be seen."""
        return self.prints and sys.stdout.isatty()

    def loggers(self, folder: Path | None) -> Loggers:
        if self.logger is not None:
            return self.logger
        if folder is None:
            return DummyLogger()  # for callbacks that need one, such as LearningRateMonitor
        return [
            CSVLogger(folder / "logs", name="csv"),
            TensorBoardLogger(folder / "logs", name="tensorboard"),
        ]


@dataclass(frozen=True)
class _Sets:
    """The loaders: one to train on, and one to report on, if there is any."""

    train: DataLoader[Any]
    has_own_loader: bool
    judging: DataLoader[Any] | None
    is_calibration: bool

    @classmethod
    def of(
        cls, train: Data, calibration: Data | None, validation: Data | None, config: FitConfig
    ) -> _Sets:
        if config.class_balance == "sampling" and isinstance(train, DataLoader):
            raise InvalidArgumentError(
                "'class_balance' counts the labels of a data set. Got a DataLoader: give fit the "
                "data set, or balance in the loader."
            )
        if config.validation_share:
            if validation is not None or isinstance(train, DataLoader):
                raise InvalidArgumentError(
                    "'validation_share' cuts validation data from a data set. Got "
                    f"{'a DataLoader' if validation is None else 'validation data as well'}: give "
                    "fit validation=... and leave validation_share out."
                )
            train, validation = _cut(train, config)
        judging = calibration if validation is None else validation
        return cls(
            train=_train_loader(train, config),
            has_own_loader=isinstance(train, DataLoader),
            judging=None if judging is None else _loader(judging, config),
            is_calibration=validation is None,
        )


def _fit(
    task: Task, sets: _Sets, folder: Path | str | None, resume: bool, reports: _Reports
) -> History:
    network, config = task.network, task.config
    with ExitStack() as stack:
        private = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="offramp-fit-")))
        place = private if folder is None else Path(folder).absolute()
        if place.exists() and not place.is_dir():
            raise InvalidArgumentError(f"Expected a folder to write to. Got the file {place}.")
        last = place / LAST_CHECKPOINT
        checkpoint = check_checkpoint(last, network, task) if resume and last.exists() else None
        _note_choosers(task, sets, reports.callbacks)
        if folder is not None:
            if resume:
                read_choice(place, network)
            write_choice(place, network)
        network.train()
        stack.callback(network.eval)
        stack.enter_context(quiet_lightning())
        stack.enter_context(quiet_torch())
        stack.enter_context(own_errors())
        spawned = Spawned(private / "states.pt")
        report = EpochReport(
            place / METRICS_FILE,
            task.num_exits,
            prints=reports.prints,
            is_validated=sets.judging is not None and not sets.is_calibration,
        )
        keep = [] if folder is None else [LastCheckpoint(place)]
        several = [spawned] if config.devices > 1 else []
        trainer = _trainer(
            task,
            sets,
            reports,
            folder=None if folder is None else place,
            callbacks=[*several, *reports.callbacks, report, *keep],
        )
        judging = sets.judging
        trainer.fit(
            task,
            sets.train,
            EveryProcess(judging) if judging is not None and config.devices > 1 else judging,
            ckpt_path=checkpoint,
            weights_only=True,
        )
        spawned.restore(reports.callbacks)
        return History.read(report.path)


def _trainer(
    task: Task,
    sets: _Sets,
    reports: _Reports,
    *,
    folder: Path | None,
    callbacks: list[Callback],
) -> Trainer:
    config = task.config
    bar: list[Callback] = [RichProgressBar(leave=False)] if reports.is_watched else []
    return Trainer(
        max_epochs=config.epochs,
        accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu"}[config.device],
        devices=config.devices,
        precision="bf16-mixed" if config.precision == "bfloat16" else "32-true",
        # Layers that a forward leaves out get no gradient, which processes would wait for.
        strategy="ddp_spawn_find_unused_parameters_true" if config.devices > 1 else "auto",
        gradient_clip_val=config.gradient_clip_val,
        callbacks=[*bar, *callbacks],
        logger=reports.loggers(folder),
        profiler=SimpleProfiler(),
        default_root_dir=folder,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_model_summary=False,
        enable_progress_bar=reports.is_watched or reports.has_bar,
        num_sanity_val_steps=0,
        use_distributed_sampler=sets.has_own_loader,
    )


_OF_TRAINING = ("train_", "lr", "step", "epoch")
"""Prefixes of figures that tell nothing of held-out samples."""


def _note_choosers(task: Task, sets: _Sets, callbacks: Sequence[Callback]) -> None:
    """Refuse what goes by validation figures without any; note it where they are calibration's."""
    monitors = {type(c).__name__: getattr(c, "monitor", None) for c in callbacks}
    made = task.planned_optimizers()
    schedule = made.get("lr_scheduler") if isinstance(made, Mapping) else None
    if isinstance(schedule, Mapping):
        monitors[type(schedule["scheduler"]).__name__] = schedule.get("monitor")
    for who, figure in monitors.items():
        if not isinstance(figure, str) or figure.startswith(_OF_TRAINING):
            continue
        if sets.judging is None:
            if figure == VAL_LOSS or "_exit_" in figure:
                raise InvalidArgumentError(
                    f"{who} goes by {figure!r}, a figure of validation data. There is none: give "
                    "fit validation=..., or set validation_share in FitConfig."
                )
        elif sets.is_calibration:
            note_choice(task.network, f"{who} by {figure!r}", sets.judging)


def _check_lightning(callbacks: Sequence[Callback], logger: Loggers) -> None:
    loggers = logger if isinstance(logger, Sequence) else [logger]
    for name, kind, things in (("callbacks", Callback, callbacks), ("logger", Logger, loggers)):
        for thing in things:
            if not isinstance(thing, kind | bool | None):
                raise InvalidArgumentError(
                    f"The {name!r} parameter must hold what lightning.pytorch calls a "
                    f"{kind.__name__}. Got {type(thing).__module__}.{type(thing).__name__}: import "
                    "it from lightning.pytorch, and make an instance."
                )


def _cut(train: Dataset[Any], config: FitConfig) -> tuple[Dataset[Any], Dataset[Any]]:
    """Cut validation data from train, by the seed."""
    share, seed = config.validation_share, config.seed
    if isinstance(train, Batches):
        return split_off_calibration(train, share=share, seed=seed, uniform_prior=False)
    dataset = samples_of(train)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    count = round(share * len(order))
    if count == 0:
        raise InvalidArgumentError(
            f"A 'validation_share' of {share} sets no sample of {len(order)} aside. Use a larger "
            "one, or 0."
        )
    rows = order.tolist()
    return Subset(dataset, sorted(rows[count:])), Subset(dataset, sorted(rows[:count]))


def _train_loader(train: Data, config: FitConfig) -> DataLoader[Any]:
    if isinstance(train, DataLoader):
        return checked_loader(train)
    dataset = samples_of(train)
    class_balanced = config.class_balance == "sampling"
    labels_N = _labels(dataset) if class_balanced else torch.zeros(len(dataset), dtype=torch.int64)
    sampler = EpochSampler(labels_N, seed=config.seed, class_balanced=class_balanced)
    return make_loader(dataset, batch_size=config.batch_size, sampler=sampler)


def _labels(train: Dataset[Any]) -> Tensor:
    if isinstance(train, Batches):
        return train.labels_N
    return torch.cat([read_batch(batch)[1] for batch in batches_of(train)])


def _loader(data: Data, config: FitConfig) -> DataLoader[Any]:
    if isinstance(data, DataLoader):
        return checked_loader(data)
    return make_loader(samples_of(data), batch_size=config.batch_size)
