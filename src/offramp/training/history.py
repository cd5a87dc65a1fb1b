"""The record of a training: a line an epoch, on paper and in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from offramp.artifacts import atomic_path
from offramp.errors import ArtifactError, DataError, MissingExtraError
from offramp.training.tasks.halting import TOKENS_METRIC
from offramp.training.tasks.maps import MEAN_IOU_METRIC
from offramp.training.tasks.skip import BLOCKS_METRIC
from offramp.training.tasks.task import ACCURACY_METRIC, VAL_LOSS

METRICS_FILE = "metrics.jsonl"

_SHARES = {BLOCKS_METRIC: "blocks run", TOKENS_METRIC: "tokens run"}
"""Names of the shares of a network that is run, in the line of an epoch."""


@dataclass(frozen=True)
class History(Sequence[Mapping[str, Any]]):
    """Figures of each epoch of a training; ``print`` it for a table.

    Attributes:
        epochs: A dict an epoch: ``epoch`` from 1, ``train_loss``, ``epoch_s``, ``data_share`` (of
            that time, spent on waiting for data); where there was validation data ``val_loss``,
            ``exit_accuracy`` (a fraction for each exit) and, where every pixel has a class,
            ``exit_mean_iou``; ``metrics`` by name, where callbacks or you logged more.
    """

    epochs: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, path: Path) -> History:
        """Read the lines of a ``metrics.jsonl``; none if there is no such file."""
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        try:
            return cls(tuple(json.loads(line) for line in lines))
        except ValueError as error:
            raise ArtifactError(f"{path} is damaged: {error}. Train the run again.") from error

    def __len__(self) -> int:
        return len(self.epochs)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Mapping[str, Any], ...]: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | tuple[Mapping[str, Any], ...]:
        return self.epochs[index]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.epochs)

    def rows(self) -> list[dict[str, Any]]:
        """A flat dict an epoch, lists spread over a column for each exit."""
        return [_flat(epoch) for epoch in self.epochs]

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame.

        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingExtraError("to_frame() needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.rows())

    def __str__(self) -> str:
        rows = self.rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[_cell(row.get(name)) for name in names] for row in rows]
        widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
        lines = [
            "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
            for line in [names, *cells]
        ]
        return "\n".join(lines)


def _flat(epoch: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in epoch.items():
        if isinstance(value, list):
            row |= {f"{name.removeprefix('exit_')}_exit_{k}": v for k, v in enumerate(value)}
        elif isinstance(value, Mapping):
            row |= value
        else:
            row[name] = value
    return row


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


class EpochReport(Callback):
    """Writes a line per epoch, and prints one: loss, accuracies, seconds."""

    def __init__(self, path: Path, num_exits: int, *, prints: bool, is_validated: bool) -> None:
        self.path = path
        self.num_exits = num_exits
        self.prints = prints
        self.is_validated = is_validated

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        self._marks = _profiled_seconds(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the line; all processes add up what it says."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if "train_loss" not in metrics:
            raise DataError("Expected at least one batch to train on. The loader gave none.")
        train_loss = torch.tensor(metrics.pop("train_loss"), device=pl_module.device)
        train_loss = trainer.strategy.reduce(train_loss, reduce_op="mean")
        if not trainer.is_global_zero:
            return
        data_s, step_s = (
            after - before
            for before, after in zip(self._marks, _profiled_seconds(trainer), strict=True)
        )
        metrics.pop("train_loss_step", None)
        ious, accuracies = (
            self._per_exit(name, metrics) for name in (MEAN_IOU_METRIC, ACCURACY_METRIC)
        )
        epoch_s = time.perf_counter() - self._start
        record = {
            "epoch": trainer.current_epoch + 1,
            "train_loss": float(train_loss),
            **({VAL_LOSS: metrics.pop(VAL_LOSS)} if VAL_LOSS in metrics else {}),
            "exit_accuracy": accuracies,
            **({"exit_mean_iou": ious} if ious else {}),
            **{name: metrics.pop(name) for name in _SHARES if name in metrics},
            **({"metrics": metrics} if metrics else {}),
            "epoch_s": round(epoch_s, 3),
            "data_share": round(data_s / (data_s + step_s), 4),
        }
        self._append(record)
        if self.prints:
            print(self._line(record, trainer.max_epochs), flush=True)

    def _line(self, record: Mapping[str, Any], num_epochs: int | None) -> str:
        shares = record.get("exit_mean_iou") or record["exit_accuracy"]
        exits = "  ".join(f"{100 * share:.2f}" for share in shares)
        unit = "% mean IoU" if "exit_mean_iou" in record else "%"
        return (
            f"epoch {record['epoch']}/{num_epochs}  loss {record['train_loss']:.4f}"
            + (f"  val_loss {record[VAL_LOSS]:.4f}" if self.is_validated else "")
            + (f"  exits {exits} {unit}" if exits else "")
            + "".join(
                f"  {words} {100 * record[name]:.1f} %"
                for name, words in _SHARES.items()
                if name in record
            )
            + f"  {record['epoch_s']:.1f} s"
        )

    def _per_exit(self, metric: str, metrics: dict[str, float]) -> list[float]:
        """Take an exit's figures out of the metrics."""
        names = map(metric.format, range(self.num_exits))
        return [metrics.pop(name) for name in names if name in metrics]

    def _append(self, record: dict[str, Any]) -> None:
        """Add a line; lines of this epoch and later ones stem from a run that was killed."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if json.loads(line)["epoch"] < record["epoch"]]
        with atomic_path(self.path) as temporary:
            temporary.write_text("\n".join([*kept, json.dumps(record)]) + "\n")


def _profiled_seconds(trainer: Trainer) -> tuple[float, float]:
    profiler = trainer.profiler  # type: ignore[attr-defined]
    durations: dict[str, list[float]] = profiler.recorded_durations
    waiting = "[_TrainingEpochLoop].train_dataloader_next"
    return sum(durations[waiting]), sum(durations["run_training_batch"])
