"""Answers to picture files or texts; of a bundle, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.artifacts import require_run
from offramp.data.preprocessing import inputs_of
from offramp.errors import InvalidArgumentError
from offramp.runtime import Session, read_bundle
from offramp.runtime.answers import SampleAnswer, describe_answers
from offramp.runtime.bundle import is_bundle
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
        from offramp.workflow.opened_run import answer_samples  # torch

        return Predicted(answers=answer_samples(folder, samples, device, network), note=None)
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
