"""Answers to picture files or texts; of a bundle, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.data.preprocessing import inputs_of
from offramp.errors import InvalidArgumentError
from offramp.runtime import Session, read_bundle
from offramp.runtime.answers import SampleAnswer, describe_answers
from offramp.runtime.bundle import is_bundle
from offramp.workflow.artifact import require_run
from offramp.workflow.preprocessing import preprocessing_of


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Answers, and what had to be taken for granted.

    Attributes:
        answers: One for each sample.
        note: What the bundle does not say; None where it says all.
    """

    answers: list[SampleAnswer]
    note: str | None


def predict(
    folder: Path, samples: Sequence[str], device: str | None = None, network: str | None = None
) -> Predicted:
    """Answer picture files, or texts, as a run or a bundle does."""
    if not is_bundle(folder):
        require_run(folder)
        return _ask_run(folder, samples, device, network)
    if network is not None:
        raise InvalidArgumentError(
            f"--network is for a run. {folder} is a bundle, which holds its network: leave it out."
        )
    return _ask_bundle(folder, samples, device)


def _ask_bundle(folder: Path, samples: Sequence[str], device: str | None) -> Predicted:
    if device not in (None, "cpu"):
        raise InvalidArgumentError(
            f"The device of a bundle must be cpu: onnxruntime runs it there. Got {device!r}."
        )
    bundle = read_bundle(folder)
    preprocessing, note = preprocessing_of(bundle)
    first = bundle.inputs[0].sample_shape
    inputs = inputs_of(
        samples,
        preprocessing,
        num_inputs=len(bundle.inputs),
        length=first[0] if len(first) == 1 else None,
    )
    session = Session(bundle)
    answers = describe_answers(
        session.run(*inputs),
        policy=bundle.policy,
        class_names=bundle.class_names,
        plain_macs_B=session.plain_macs(*inputs),
        size=inputs[0].shape[2:],
    )
    return Predicted(answers=answers, note=note)


def _ask_run(
    folder: Path, samples: Sequence[str], device: str | None, network: str | None
) -> Predicted:
    import torch

    from offramp.runs.own_network import num_inputs_of
    from offramp.workflow.artifact import answer_run, open_artifact

    opened: Any = open_artifact(folder, device, network)
    runner = opened.runner
    inputs = inputs_of(samples, opened.preprocessing(), num_inputs=num_inputs_of(runner.network))
    answers = answer_run(
        runner.network,
        runner.policy,
        opened.class_names,
        tuple(torch.from_numpy(array).to(opened.device) for array in inputs),
    )
    return Predicted(answers=answers, note=None)
