"""The record of samples that chose a checkpoint: no guarantee may rest on them.

A callback or a scheduler that goes by a figure of calibration samples makes the network depend on
them. ``fit`` notes which, on the network and in its folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from offramp.artifacts import read_json, write_json
from offramp.data.batches import read_batch
from offramp.decoding import decode
from offramp.errors import ArtifactError
from offramp.model.multi_exit import Features
from offramp.zoo import Network

CHOICE_FILE = "checkpoint_choice.json"
_ATTRIBUTE = "checkpoint_choice"


@dataclass(frozen=True)
class CheckpointChoice:
    """Samples that a network depends on, though it was not trained on them.

    Attributes:
        by: Which callback or scheduler went by them, and by which figure.
        samples: Digests of their inputs.
    """

    by: str
    samples: frozenset[str]


def digests(inputs: Features) -> list[str]:
    """Identify each sample of a batch by its inputs, whatever they are padded to."""
    arrays = [tensor.detach().cpu().contiguous().numpy() for tensor in inputs]
    return [_digest([array[row] for array in arrays]) for row in range(len(arrays[0]))]


def _digest(arrays: Sequence[np.ndarray[Any, Any]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.trim_zeros(array.reshape(-1), "b").tobytes())
    return digest.hexdigest()


def note_choice(network: Network, by: str, loader: Iterable[Any]) -> CheckpointChoice:
    """Note on a network that the samples of a loader choose its checkpoint."""
    samples = {digest for batch in loader for digest in digests(read_batch(batch, network)[0])}
    before = choice_of(network)
    if before is not None:
        samples |= before.samples
    choice = CheckpointChoice(by, frozenset(samples))
    network.__dict__[_ATTRIBUTE] = choice  # goes with it through copy and pickle
    return choice


def choice_of(network: nn.Module) -> CheckpointChoice | None:
    """Read what was noted on a network."""
    choice: CheckpointChoice | None = network.__dict__.get(_ATTRIBUTE)
    return choice


def who_chose_by(network: nn.Module, inputs: Features) -> str:
    """Name what chose a network's checkpoint by a sample of this batch; empty if nothing did."""
    choice = choice_of(network)
    if choice is None or choice.samples.isdisjoint(digests(inputs)):
        return ""
    return choice.by


def write_choice(folder: Path, network: nn.Module) -> None:
    """Write what was noted on a network into a run folder; if nothing was, leave no file."""
    choice = choice_of(network)
    if choice is None:
        (folder / CHOICE_FILE).unlink(missing_ok=True)
    else:
        write_json(folder / CHOICE_FILE, {"by": choice.by, "samples": sorted(choice.samples)})


def read_choice(folder: Path, network: nn.Module) -> None:
    """Note on a network what its run folder says, if it says anything."""
    path = folder / CHOICE_FILE
    if not path.exists():
        return
    content = read_json(path)
    try:
        network.__dict__[_ATTRIBUTE] = decode(content, CheckpointChoice)
    except ArtifactError as error:
        raise ArtifactError(f"{path} is damaged: {error}. Train the run again.") from error
