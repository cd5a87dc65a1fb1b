"""Writing a run's bundle, checked against torch, and the int8 one beside it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from offramp.artifacts import BUNDLE_FOLDER
from offramp.calibration.collect import collect_from_session
from offramp.calibration.evidence import choose_policy
from offramp.data.images import in_tensors, make_loader
from offramp.errors import InvalidArgumentError, NotCalibratedError
from offramp.evaluation.answers import Answers
from offramp.evaluation.evaluate import answer
from offramp.exporting.bundle import check_parity
from offramp.exporting.bundle import export as write
from offramp.exporting.quantize import quantize
from offramp.families import family_of
from offramp.measure.agreement import Agreement
from offramp.model.multi_exit import Features, as_features
from offramp.policy.confidence import PIXEL_SHARE
from offramp.runs.own_network import load_run
from offramp.runs.run import Run
from offramp.runtime import Session, with_thresholds
from offramp.runtime.bundle import write_bundle
from offramp.workflow.held_out import samples_of_run
from offramp.workflow.opened_run import preprocessing_of_run
from offramp.workflow.samples import CALIBRATION
from offramp.workflow.wanted import LEARNED, TARGETS

SHARE_TOLERANCE = 0.01
"""Thresholds are chosen anew where quantising moves the share of an exit by more than this."""

_PARITY_SAMPLES = 512
_BEYOND_THRESHOLDS = ("guarantee", "patience", "temperatures")
"""Choices that thresholds alone, on the logits of the int8 network, do not make again."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Effects of int8 on accuracy and on who leaves where.

    Attributes:
        before: What the float32 bundle said of the samples.
        after: What the int8 one says.
        anew: What it says with thresholds chosen anew; None where they stay.
        kept: Why thresholds stay though shares moved: as they were "set by hand" or "chosen for
            float32"; None where they had no need to change, or did.
        had_guarantee: Whether a promise was made of the float32 network.
    """

    before: Answers
    after: Answers
    anew: Answers | None
    kept: str | None
    had_guarantee: bool


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A bundle that was written.

    Attributes:
        folder: Where.
        num_exits: Exits of the network.
        num_steps: Steps of the bundle in float32.
        num_samples: Samples that it was checked on.
        agreement: How near it is to torch on these.
        quantized: What int8 did; None in float32.
    """

    folder: Path
    num_exits: int
    num_steps: int
    num_samples: int
    agreement: Agreement
    quantized: Quantized | None


def export(
    run: Path,
    out: Path | None = None,
    *,
    int8: bool = False,
    plain: bool = True,
    layers_per_step: int = 1,
    data: str | None = None,
    network: str | None = None,
) -> Exported:
    """Write the bundle of a run, in float32 or in int8, and check it on samples of its data."""
    loaded = load_run(run, network)
    family = family_of(loaded.network)
    if int8 and family.thresholds is not None:
        raise InvalidArgumentError(
            f"--quantize is for networks with exits. {run} has one, and a threshold of "
            f"{family.settings}: export it in float32."
        )
    if loaded.policy is None:
        raise NotCalibratedError(
            f"The run {run} has no policy to export. Choose one: offramp calibrate {run} ..."
        )
    of_run = samples_of_run(loaded)
    preferred = CALIBRATION if of_run.has_calibration else ("train",)
    split = None if of_run.has_calibration else "train"
    batches = in_tensors(of_run.load(split, data=data, preferred=preferred).batches)
    count = min(_PARITY_SAMPLES, 2 * batches.run_batch_size)
    spread = range(0, len(batches), max(1, len(batches) // count))
    samples, _ = batches.__getitems__(list(spread)[:count])
    folder, quantized = out or run / BUNDLE_FOLDER, None
    if int8:
        loader = make_loader(batches, batch_size=batches.run_batch_size)
        with tempfile.TemporaryDirectory() as scratch:
            float_folder = Path(scratch) / "float32"
            num_steps, agreement = _write_float(loaded, float_folder, samples, plain=plain)
            quantize(float_folder, folder, samples)
            before = answer(Session(float_folder), loader)
        quantized = _compare(loaded, folder, before, loader)
    else:
        num_steps, agreement = _write_float(
            loaded, folder, samples, plain=plain, layers_per_step=layers_per_step
        )
    return Exported(
        folder=folder,
        num_exits=loaded.network.num_exits,
        num_steps=num_steps,
        num_samples=len(as_features(samples)[0]),
        agreement=agreement,
        quantized=quantized,
    )


def _write_float(
    loaded: Run, folder: Path, samples: Tensor | Features, *, plain: bool, layers_per_step: int = 1
) -> tuple[int, Agreement]:
    assert loaded.policy is not None  # export has made sure
    bundle = write(
        loaded.network,
        loaded.policy,
        folder,
        samples,
        class_names=loaded.class_names,
        recipe=None if loaded.recipe is None else loaded.recipe.to_dict(),
        preprocessing=preprocessing_of_run(loaded),
        calibration=loaded.calibration,
        plain=plain,
        layers_per_step=layers_per_step,
    )
    agreement = check_parity(Session(bundle), loaded.network, loaded.policy, samples)
    return bundle.num_steps, agreement


def _compare(loaded: Run, folder: Path, before: Answers, loader: DataLoader[Any]) -> Quantized:
    """Say what int8 changed, and choose thresholds anew where other samples leave than before."""
    after, calibration = answer(Session(folder), loader), loaded.calibration or {}
    anew = kept = None
    if _moved(before, after, loaded.network.num_exits):
        kept = _choose_anew(folder, loader, calibration)
        anew = answer(Session(folder), loader) if kept is None else None
    return Quantized(
        before=before,
        after=after,
        anew=anew,
        kept=kept,
        had_guarantee=bool(calibration.get("guarantee")),
    )


def _moved(before: Answers, after: Answers, num_exits: int) -> bool:
    shares = zip(before.shares(num_exits), after.shares(num_exits), strict=True)
    return any(abs(one - other) > SHARE_TOLERANCE for one, other in shares)


def _choose_anew(folder: Path, loader: DataLoader[Any], calibration: dict[str, Any]) -> str | None:
    """Choose thresholds for the int8 network; if they stay, say how they came about."""
    asked = calibration.get("asked") or {}
    target = {name: asked[name] for name in (*TARGETS, "risk") if asked.get(name) is not None}
    needs_more = any(asked.get(name) for name in _BEYOND_THRESHOLDS)
    needs_more |= bool((calibration.get("data") or {}).get("weighted"))
    needs_more |= asked.get("rule") in (LEARNED, PIXEL_SHARE)
    if not target or needs_more:
        return "set by hand" if "thresholds" in asked or not asked else "chosen for float32"
    session = Session(folder)
    chosen = choose_policy(collect_from_session(session, loader), rule=asked["rule"], **target)
    write_bundle(with_thresholds(session.bundle, chosen.policy.thresholds))
    return None
