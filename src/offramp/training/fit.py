"""Training a multi-exit network with Lightning: ``fit`` and what it writes."""

from __future__ import annotations

import json
import logging
import pickle
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader, Dataset

from offramp import errors
from offramp.artifacts import SCHEMA_VERSION, atomic_path
from offramp.errors import ArtifactError, DataError, InvalidArgumentError, reason
from offramp.model.multi_exit import MultiExitNetwork
from offramp.routing.halting import HaltingNetwork
from offramp.routing.skip import SkipNetwork
from offramp.training.config import FitConfig
from offramp.training.config_checks import check_config
from offramp.training.data import Batches, EpochSampler, make_loader
from offramp.training.dense_task import MEAN_IOU_METRIC, DenseTask
from offramp.training.halting_task import TOKENS_METRIC, HaltingTask
from offramp.training.regimes import frozen_backbone
from offramp.training.skip_task import BLOCKS_METRIC, SkipTask
from offramp.training.task import ACCURACY_METRIC, MultiExitTask, Task

LAST_CHECKPOINT = "last.ckpt"
METRICS_FILE = "metrics.jsonl"


def fit(
    network: MultiExitNetwork | SkipNetwork | HaltingNetwork,
    train: Dataset[Any] | DataLoader[Any],
    calibration: Dataset[Any] | DataLoader[Any] | None = None,
    config: FitConfig | None = None,
    *,
    folder: Path | str | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train a network in place: every exit at once, gates that skip blocks, tokens that halt.

    With a ``folder``, every epoch ends with a checkpoint (``last.ckpt``), a line in
    ``metrics.jsonl``, and Lightning's CSV and TensorBoard logs under ``logs/``. Given a Dataset,
    order of samples, augmentation and dropout depend on the seed and the epoch alone: a run that
    was killed and resumed ends with the weights of the unbroken run (same device and number of
    threads). The order of a DataLoader is its own.

    Args:
        network: The network to train.
        train: Pairs of (input, class), or a loader of batches of them; the input is a tuple of
            tensors where the network takes several.
        calibration: Held-out pairs, to report each exit's accuracy after every epoch.
        config: How to train; ``FitConfig()`` if None.
        folder: An existing folder for checkpoint and logs; nothing is written if None.
        resume: Go on from the folder's checkpoint, if there is one.
        callbacks: Lightning callbacks to run as well.
    Raises:
        InvalidArgumentError: If the config does not suit the network or this machine, or class
            balance was asked for where the labels are unknown.
        DataError: If a label is outside the network's classes, or there is no sample.
        TrainingDivergedError: If the loss is no longer finite; a folder keeps the last checkpoint.
        ArtifactError: If the checkpoint to resume from is damaged or of another run.
    """
    config = config or FitConfig()
    check_config(network, config)
    checkpoint = _to_resume(Path(folder), network) if resume and folder is not None else None
    if config.class_balance == "sampling" and isinstance(train, DataLoader):
        raise InvalidArgumentError(
            "'class_balance' counts the labels of a data set. Got a DataLoader: give fit the "
            "data set, or balance in the loader."
        )
    network.train()
    with _quiet_lightning(), _own_errors(), _frozen(network, config):
        trainer = _trainer(
            config,
            folder=None if folder is None else Path(folder).absolute(),
            callbacks=callbacks,
            num_exits=network.num_exits,
            has_own_loader=isinstance(train, DataLoader),
            may_leave_out=isinstance(network, SkipNetwork),  # settled gates get no gradient
        )
        trainer.fit(
            _task(network, config),
            _train_loader(train, config),
            None if calibration is None else _loader(calibration, config),
            ckpt_path=checkpoint,
            weights_only=True,
        )
    network.eval()


def _to_resume(folder: Path, network: nn.Module) -> Path | None:
    path = folder / LAST_CHECKPOINT
    return check_checkpoint(path, network) if path.exists() else None


def check_checkpoint(path: Path, network: nn.Module) -> Path:
    """Make sure that a checkpoint is whole and belongs to a network, before training touches it.

    Args:
        path: A ``last.ckpt``.
        network: The network about to be trained.
    Returns:
        The path.
    Raises:
        ArtifactError: If it is damaged, of a newer schema, or of another network.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content[_SCHEMA_KEY]
        shapes = {name: tensor.shape for name, tensor in content["state_dict"].items()}
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
    return path


_SCHEMA_KEY = "offramp_schema_version"
_UNREADABLE = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    pickle.UnpicklingError,
)


class _LastCheckpoint(Callback):
    """Writes ``last.ckpt`` at the end of every epoch, whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[_SCHEMA_KEY] = SCHEMA_VERSION

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        temporary = self.folder / f".{LAST_CHECKPOINT}.partial"
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            temporary.replace(self.folder / LAST_CHECKPOINT)


_SHARES = {BLOCKS_METRIC: "blocks run", TOKENS_METRIC: "tokens run"}
"""What a line per epoch calls the shares of a network that is run."""


class _EpochReport(Callback):
    """Writes and prints a line per epoch: loss, accuracies, seconds, share of time on data."""

    def __init__(self, folder: Path, num_exits: int) -> None:
        self.path = folder / METRICS_FILE
        self.num_exits = num_exits

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()
        self._marks = _profiled_seconds(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        data_s, step_s = (
            after - before
            for before, after in zip(self._marks, _profiled_seconds(trainer), strict=True)
        )
        metrics = trainer.callback_metrics
        accuracies = self._per_exit(ACCURACY_METRIC, metrics)
        ious = self._per_exit(MEAN_IOU_METRIC, metrics)
        epoch, loss = trainer.current_epoch + 1, float(metrics["train_loss_epoch"])
        epoch_s = time.perf_counter() - self._start
        run = {name: float(metrics[name]) for name in _SHARES if name in metrics}
        self._append(
            {
                "epoch": epoch,
                "train_loss": loss,
                "exit_accuracy": accuracies,
                **({"exit_mean_iou": ious} if ious else {}),
                **run,
                "epoch_s": round(epoch_s, 3),
                "data_share": round(data_s / (data_s + step_s), 4),
            }
        )
        exits = "  ".join(f"{100 * share:.2f}" for share in ious or accuracies)
        print(
            f"epoch {epoch}/{trainer.max_epochs}  loss {loss:.4f}"
            + (f"  exits {exits} %{' mean IoU' if ious else ''}" if accuracies else "")
            + "".join(f"  {_SHARES[name]} {100 * share:.1f} %" for name, share in run.items())
            + f"  {epoch_s:.1f} s",
            flush=True,
        )

    def _per_exit(self, metric: str, metrics: Mapping[str, Tensor]) -> list[float]:
        names = map(metric.format, range(self.num_exits))
        return [float(metrics[name]) for name in names if name in metrics]

    def _append(self, record: dict[str, Any]) -> None:
        """Add a line; lines of this epoch and later ones stem from a run that was killed."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["epoch"] < record["epoch"]]
        with atomic_path(self.path) as temporary:
            temporary.write_text("\n".join([*kept, json.dumps(record)]) + "\n")


def _task(network: MultiExitNetwork | SkipNetwork | HaltingNetwork, config: FitConfig) -> Task:
    if isinstance(network, SkipNetwork):
        return SkipTask(network, config)
    if isinstance(network, HaltingNetwork):
        return HaltingTask(network, config)
    if network.is_dense:
        return DenseTask(network, config)
    return MultiExitTask(network, config)


def _trainer(
    config: FitConfig,
    *,
    folder: Path | None,
    callbacks: Sequence[Callback],
    num_exits: int,
    has_own_loader: bool,
    may_leave_out: bool,
) -> Trainer:
    is_watched = sys.stdout.isatty()
    several = "ddp_spawn_find_unused_parameters_true" if may_leave_out else "ddp_spawn"
    own: list[Callback] = [RichProgressBar(leave=False)] if is_watched else []
    if folder is not None:
        own += [_EpochReport(folder, num_exits), _LastCheckpoint(folder)]
    return Trainer(
        max_epochs=config.epochs,
        accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu"}[config.device],
        devices=config.devices,
        precision="bf16-mixed" if config.precision == "bfloat16" else "32-true",
        strategy=several if config.devices > 1 else "auto",
        callbacks=[*own, *callbacks],
        logger=_loggers(folder) if folder is not None else False,
        profiler=SimpleProfiler(),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=is_watched,
        num_sanity_val_steps=0,
        use_distributed_sampler=has_own_loader,
    )


def _profiled_seconds(trainer: Trainer) -> tuple[float, float]:
    profiler = trainer.profiler  # type: ignore[attr-defined]
    durations: dict[str, list[float]] = profiler.recorded_durations
    waiting = "[_TrainingEpochLoop].train_dataloader_next"
    return sum(durations[waiting]), sum(durations["run_training_batch"])


def _train_loader(train: Dataset[Any] | DataLoader[Any], config: FitConfig) -> DataLoader[Any]:
    if isinstance(train, DataLoader):
        return train
    class_balanced = config.class_balance == "sampling"
    labels_N = _labels(train) if class_balanced else torch.zeros(_length(train), dtype=torch.int64)
    sampler = EpochSampler(labels_N, seed=config.seed, class_balanced=class_balanced)
    return make_loader(train, batch_size=config.batch_size, sampler=sampler)


def _labels(train: Dataset[Any]) -> Tensor:
    if isinstance(train, Batches):
        return train.labels_N
    return torch.tensor([int(train[i][1]) for i in range(_length(train))])


def _length(dataset: Dataset[Any]) -> int:
    if not isinstance(dataset, Sized):
        raise InvalidArgumentError(
            "Expected a map-style Dataset with a length, or a DataLoader. "
            f"Got {type(dataset).__name__}: wrap it in a DataLoader."
        )
    if len(dataset) == 0:
        raise DataError("Expected at least one sample to train on. Got none.")
    return len(dataset)


def _loader(data: Dataset[Any] | DataLoader[Any], config: FitConfig) -> DataLoader[Any]:
    return data if isinstance(data, DataLoader) else make_loader(data, batch_size=config.batch_size)


def _loggers(folder: Path) -> list[Logger]:
    return [
        CSVLogger(folder / "logs", name="csv"),
        TensorBoardLogger(folder / "logs", name="tensorboard"),
    ]


def _frozen(
    network: MultiExitNetwork | SkipNetwork | HaltingNetwork, config: FitConfig
) -> AbstractContextManager[None]:
    if isinstance(network, MultiExitNetwork) and config.freeze_backbone:
        return frozen_backbone(network)
    return nullcontext()


@contextmanager
def _own_errors() -> Iterator[None]:
    """Let an interruption be one, and an error of ours from another process be that error."""
    try:
        yield
    except SystemExit as error:  # what Lightning makes of Ctrl-C and of SIGTERM
        raise KeyboardInterrupt from error
    except ProcessRaisedException as error:
        name, _, message = str(error).strip().splitlines()[-1].partition(": ")
        if not name.startswith("offramp.errors."):
            raise
        raise getattr(errors, name.rpartition(".")[2])(message) from error


_LIGHTNING_TIPS = (
    ".*does not have many workers.*",
    ".*training batches.*logging interval.*",
    ".*no `val_dataloader`.*",
    ".*LeafSpec.*is deprecated.*",
)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips about workers, loggers and hardware; errors still show."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for tip in _LIGHTNING_TIPS:
                warnings.filterwarnings("ignore", message=tip)
            yield
    finally:
        logger.setLevel(level)
