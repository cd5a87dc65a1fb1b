"""Every exit's logits over a data set, computed once.

Shapes: ``K`` exits, ``N`` samples, ``B`` batch, ``C`` classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.artifacts import atomic_path
from offramp.calibration.logits import DenseLogits, ExitLogits, at_half_precision
from offramp.data.batches import batches_of, explained_data, read_batch
from offramp.data.labels import check_labels
from offramp.decoding import Count, decode, parse_json
from offramp.errors import ArtifactError, DataError
from offramp.families import FAMILIES, family_of
from offramp.measure.cost import ExitCosts, evaluation_mode
from offramp.measure.dense import confusion_matrices, label_maps
from offramp.model.multi_exit import Features
from offramp.policy.as_dict import policy_from_dict
from offramp.policy.policies import Policy
from offramp.runtime import Session, with_routing_threshold
from offramp.runtime.session import check_inputs
from offramp.runtime.step_macs import Measured, StepMacs
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
    """Run every step of a bundle on every sample of a data set, letting nobody leave."""
    bundle = session.bundle
    thresholds = FAMILIES[bundle.family].thresholds
    if thresholds is None:
        run = partial(_every_exit, session)
        numbers = tuple(step.exit_index for step in bundle.steps)
    else:
        run = partial(_only_exit, Session(with_routing_threshold(bundle, thresholds[-1])))
        numbers = (0,)
    gathered, macs = _Gathered(), _BundleMacs(session)
    for batch in batches_of(data, batch_size=batch_size):
        inputs, labels_B = read_batch(batch)
        gathered.add(run(inputs), labels_B)
        macs.add(inputs)
    if gathered.is_empty:
        raise DataError("Expected at least one batch of samples to collect logits from. Got none.")
    return gathered.logits(macs.costs(), numbers, is_ragged=bundle.padding is not None)


class _BundleMacs:
    """Costs of a bundle's parts for the mean of some samples, each of its own length."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._steps = StepMacs(session.bundle) if session.bundle.family == "exits" else None
        self._measured: list[Measured] = []

    def add(self, inputs: Features) -> None:
        if self._steps is None:
            self._measured.append(self._session.plain_macs(*inputs))
        else:
            self._measured.append(self._steps.trim(check_inputs(self._session.bundle, inputs))[1])

    def costs(self) -> ExitCosts:
        bundle = self._session.bundle
        if self._steps is None:
            plain_macs = round(float(np.concatenate(self._measured).mean()))
            return ExitCosts(stage_macs=(plain_macs,), head_macs=(0,))
        is_ragged = bundle.padding is not None
        mean = self._steps.mean(np.concatenate(self._measured) if is_ragged else self._measured[-1])
        decides = policy_from_dict(dict(bundle.policy))
        assert isinstance(decides, Policy)  # about exits
        # Without what its own policy takes to decide: others are to be measured too.
        heads = zip(bundle.steps, mean.heads, strict=True)
        return ExitCosts(
            stage_macs=mean.stages,
            head_macs=tuple(macs - decides.macs(step.exit_index) for step, macs in heads),
        )


class _Gathered:
    """Logits and labels, batch after batch; dense ones at half precision, with their figures."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._confusion: list[Tensor] = []

    @property
    def is_empty(self) -> bool:
        return not self._labels

    def add(self, outputs_KBC: Tensor, labels_B: Tensor) -> None:
        outputs_KBC = outputs_KBC.float()
        check_labels(labels_B, num_classes=outputs_KBC.shape[2])
        if bool(outputs_KBC.isnan().any()):
            raise DataError(
                "Expected logits that are numbers. The network says NaN of a sample: check that "
                "its weights and inputs are finite."
            )
        if outputs_KBC.ndim == 5:
            labels_B = labels_B.to(outputs_KBC.device)
            self._confusion.append(_confusion(outputs_KBC, labels_B).cpu())
            outputs_KBC, labels_B = at_half_precision(outputs_KBC), labels_B.to(torch.uint8)
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


def _confusion(outputs_KBChw: Tensor, labels_BHW: Tensor) -> Tensor:
    size = (labels_BHW.shape[1], labels_BHW.shape[2])
    num_classes = outputs_KBChw.shape[2]
    of_exits = (
        confusion_matrices(label_maps(logits, size), labels_BHW, num_classes=num_classes)
        for logits in outputs_KBChw
    )
    return torch.stack(list(of_exits))


def _every_exit(session: Session, inputs: Features) -> Tensor:
    carried: list[Any] = check_inputs(session.bundle, inputs)
    outputs = []
    for index in range(len(session.bundle.steps)):
        _, (output, _, _, *carried) = session.run_step(index, carried)
        outputs.append(torch.from_numpy(output))
    return torch.stack(outputs)


def _only_exit(session: Session, inputs: Features) -> Tensor:
    return torch.from_numpy(session.run(*inputs).output)[None]


def write_logits(path: Path | str, logits: ExitLogits) -> None:
    """Keep logits in a file, at half precision, so that choosing need not run the network again."""
    tensors = logits.kept_tensors()
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
