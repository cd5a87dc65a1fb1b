"""Every exit's logits over a data set, computed once.

Shapes: ``K`` exits, ``N`` samples, ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.artifacts import atomic_path
from offramp.calibration.bundles import check_said, collect_steps
from offramp.calibration.dense_logits import DenseLogits
from offramp.calibration.logits import LARGEST_HALF, ExitLogits
from offramp.data.batches import batches_of, explained_data, read_batch
from offramp.decoding import Count, decode, parse_json
from offramp.errors import ArtifactError, DataError, InvalidArgumentError
from offramp.families import family_of
from offramp.measure.cost import evaluation_mode
from offramp.measure.dense import confusion_matrices, label_maps
from offramp.measure.exit_costs import ExitCosts
from offramp.measure.outputs import MAPS
from offramp.runtime import Session
from offramp.training.checkpoint_choice import who_chose_by
from offramp.zoo import Network

_ABOUT = "exits"
"""Entry of a file of logits that says what its exits cost."""


@dataclass(frozen=True, kw_only=True)
class _About:
    """All that a file of logits says beside them."""

    stage_macs: tuple[Count, ...]
    head_macs: tuple[Count, ...]
    numbers: tuple[int, ...]
    is_ragged: bool = False
    checkpoint_chosen_by: str = ""


@torch.no_grad()
def collect(
    network: Network,
    data: object,
    *,
    batch_size: int = 256,
) -> ExitLogits:
    """Run every exit on every sample, as :func:`~offramp.collect` without thresholds does."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    trained, chosen_by = network, ""
    say, network = family_of(network).whole(network)
    gathered, lengths = _Gathered(), []
    inputs = None
    with evaluation_mode(network):  # whose weights are those of what answers
        for batch in batches_of(data, batch_size=batch_size):
            inputs, labels_B = read_batch(batch, network, device=device)
            chosen_by = chosen_by or who_chose_by(trained, inputs)
            with explained_data(inputs, network):
                outputs = torch.stack(tuple(say(*inputs)))
            gathered.add(outputs, labels_B)
            if network.ragged is not None:
                lengths.append(network.ragged.lengths(inputs))
    if inputs is None:
        raise DataError("Expected at least one batch of samples to collect logits from. Got none.")
    if lengths:
        costs = network.costs_of_lengths(torch.cat(lengths), inputs)
    else:
        costs = network.costs(*inputs)
    logits = gathered.logits(costs, is_ragged=bool(lengths))
    return replace(logits, checkpoint_chosen_by=chosen_by)


def collect_from_session(session: Session, data: object, *, batch_size: int = 256) -> ExitLogits:
    """Run every step of a bundle on every sample, letting nobody leave: tensors."""
    logits = collect_steps(session, data, batch_size=batch_size)
    return replace(
        logits,
        logits_KNC=torch.as_tensor(logits.logits_KNC),
        labels_N=torch.as_tensor(logits.labels_N),
    )


def dense_logits(outputs: Sequence[Any], labels: Sequence[Any], **about: Any) -> ExitLogits:
    """Logits of every pixel, from what a bundle says of batch after batch."""
    gathered = _Gathered()
    for outputs_KBC, labels_B in zip(outputs, labels, strict=True):
        gathered.add(torch.as_tensor(outputs_KBC), torch.as_tensor(labels_B))
    return gathered.logits(**about)


class _Gathered:
    """Logits and labels, batch after batch; dense ones at half precision, with their figures."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._confusion: list[Tensor] = []

    def add(self, outputs_KBC: Tensor, labels_B: Tensor) -> None:
        outputs_KBC = outputs_KBC.float()
        check_said(outputs_KBC, labels_B)
        if outputs_KBC.ndim == 5:
            labels_B = labels_B.to(outputs_KBC.device)
            self._confusion.append(_confusion(outputs_KBC, labels_B).cpu())
            outputs_KBC, labels_B = _at_half_precision(outputs_KBC), labels_B.to(torch.uint8)
        self._outputs.append(outputs_KBC.cpu())
        self._labels.append(labels_B.cpu())

    def logits(
        self, costs: ExitCosts, numbers: tuple[int, ...] = (), *, is_ragged: bool = False
    ) -> ExitLogits:
        outputs_KNC, labels_N = torch.cat(self._outputs, dim=1), torch.cat(self._labels)
        if not self._confusion:
            return ExitLogits(
                logits_KNC=outputs_KNC,
                labels_N=labels_N,
                costs=costs,
                numbers=numbers,
                is_ragged=is_ragged,
            )
        return DenseLogits(
            logits_KNC=outputs_KNC,
            labels_N=labels_N,
            costs=costs,
            numbers=numbers,
            confusion_KNCC=torch.cat(self._confusion, dim=1),
        )


def _at_half_precision(logits: Tensor) -> Tensor:
    """Round logits; what half precision does not reach becomes its largest number, not infinite."""
    return logits.where(logits.isinf(), logits.clamp(-LARGEST_HALF, LARGEST_HALF)).half()


def _confusion(outputs_KBChw: Tensor, labels_BHW: Tensor) -> Tensor:
    size = (labels_BHW.shape[1], labels_BHW.shape[2])
    num_classes = outputs_KBChw.shape[2]
    of_exits = (
        confusion_matrices(label_maps(logits, size), labels_BHW, num_classes=num_classes)
        for logits in outputs_KBChw
    )
    return torch.stack(list(of_exits))


def write_logits(path: Path | str, logits: ExitLogits) -> None:
    """Keep logits in a file, at half precision, so that choosing need not run the network again."""
    if logits.outputs is MAPS:
        raise InvalidArgumentError(
            "Expected logits of one class a sample. Got those of every pixel, which are not kept: "
            "collect them anew."
        )
    half_KNC = _at_half_precision(torch.as_tensor(logits.logits_KNC)).contiguous()
    tensors = {"logits_KNC": half_KNC, "labels_N": torch.as_tensor(logits.labels_N)}
    about = {
        "stage_macs": logits.costs.stage_macs,
        "head_macs": logits.costs.head_macs,
        "numbers": logits.numbers,
        "is_ragged": logits.is_ragged,
        "checkpoint_chosen_by": logits.checkpoint_chosen_by,
    }
    with atomic_path(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={_ABOUT: json.dumps(about)})


def read_logits(path: Path | str) -> ExitLogits:
    """Read logits that :func:`write_logits` kept."""
    try:
        with safe_open(path, framework="pt") as file:
            about = decode(parse_json(file.metadata()[_ABOUT]), _About)
            return ExitLogits(
                logits_KNC=file.get_tensor("logits_KNC").float(),
                labels_N=file.get_tensor("labels_N"),
                costs=ExitCosts(stage_macs=about.stage_macs, head_macs=about.head_macs),
                numbers=about.numbers,
                is_ragged=about.is_ragged,
                checkpoint_chosen_by=about.checkpoint_chosen_by,
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"Expected logits of every exit in {path}, found none or damaged ones ({error})."
        ) from error
