"""Lightning and the processes it starts: their errors, warnings, and what they bring back."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.utils.data import DataLoader

from offramp import errors
from offramp.errors import InvalidArgumentError, OfframpError


class EveryProcess:
    """A loader that every process reads whole: shared out, samples would be counted twice."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


class Spawned(Callback):
    """Keeps processes that train together quiet, and brings the states of callbacks back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Silence this process: it did not inherit that."""
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        _ignore_tips()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum the epoch's figures, which takes all processes, before one of them asks alone."""
        _ = trainer.callback_metrics

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save them, in the first process."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            torch.save({each.state_key: each.state_dict() for each in callbacks}, self.path)

    def restore(self, callbacks: Sequence[Callback]) -> None:
        """Load what was saved, if anything was: several processes trained."""
        if not self.path.exists():
            return
        states = torch.load(self.path, weights_only=False)  # our own, of a moment ago
        for callback in callbacks:
            if state := states.get(callback.state_key):
                callback.load_state_dict(state)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Let processes that start meanwhile not warn that every parameter is used after all."""
    before = os.environ.get(_TORCH_LEVEL)
    os.environ[_TORCH_LEVEL] = before or "ERROR"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TORCH_LEVEL]


@contextmanager
def own_errors() -> Iterator[None]:
    """Say what Lightning and its processes raise as errors of ours, an interruption as one."""
    in_main = threading.current_thread() is threading.main_thread()
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:  # what Lightning makes of Ctrl-C and of SIGTERM
        if in_main:
            signal.signal(signal.SIGINT, on_interrupt)  # which it then ignores for good
        raise KeyboardInterrupt from error
    except ProcessRaisedException as error:
        name, _, message = str(error).strip().splitlines()[-1].partition(": ")
        own = _as_own(name, message)
        if own is None:
            raise
        raise own from error
    except ProcessExitedException as error:
        if error.exit_code != 1:
            raise
        raise InvalidArgumentError(
            "A training process ended before it began. Several processes import the script anew: "
            'call fit under `if __name__ == "__main__":`, or use devices=1.'
        ) from error
    except OfframpError:
        raise
    except Exception as error:
        kind = type(error)
        own = _as_own(f"{kind.__module__}.{kind.__name__}", str(error))
        if own is None:
            raise
        raise own from error


def _as_own(name: str, message: str) -> OfframpError | None:
    """The error of ours that says the same; None where none does."""
    said = " ".join(message.split())
    if name.startswith("offramp.errors."):
        own: OfframpError = getattr(errors, name.rpartition(".")[2])(message)
        return own
    is_about_pickling = "pickle" in said or "local object" in said
    if name.endswith("MisconfigurationException") or said.startswith("Early stopping conditioned"):
        return InvalidArgumentError(f"Lightning cannot train so: {said}")
    if is_about_pickling and name.rpartition(".")[2] in (
        "PicklingError",
        "AttributeError",
        "TypeError",
    ):
        return InvalidArgumentError(
            "Several processes get network, data and callbacks by pickle. "
            f"{said}: define it at the top of a module, or use devices=1."
        )
    return None


_LOGGERS = ("lightning.pytorch", "pytorch_lightning")  # the second speaks where it is imported too
_TORCH_LEVEL = "TORCH_CPP_LOG_LEVEL"
_TIPS = (
    ".*does not have many workers.*",
    ".*training batches.*logging interval.*",
    ".*no `val_dataloader`.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",
    ".*LeafSpec.*is deprecated.*",
)


def _ignore_tips() -> None:
    for tip in _TIPS:
        warnings.filterwarnings("ignore", message=tip)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips about workers, loggers and hardware; errors still show."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    try:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            _ignore_tips()
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
