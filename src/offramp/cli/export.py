"""``offramp export``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli.choosing import LEARNED, TARGETS
from offramp.cli.options import BUNDLE_FOLDER, DataOption, RunFolder
from offramp.errors import InvalidArgumentError, NotCalibratedError
from offramp.tables import percent

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

    from offramp.inference.evaluate import Answers
    from offramp.training.run import Run

_PARITY_SAMPLES = 512
_SHARE_TOLERANCE = 0.01
"""Thresholds are chosen anew where quantising moves the share of an exit by more than this."""
_BEYOND_THRESHOLDS = ("guarantee", "patience", "temperatures")
"""Choices that thresholds alone, on the logits of the int8 network, do not make again."""


def export(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to make; default RUN/bundle.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="int8", help="Weights in int8 instead of float32.")
    ] = None,
    plain: Annotated[
        bool, typer.Option(help="Add the plain network, to time a device's own baseline.")
    ] = True,
    layers_per_step: Annotated[
        int, typer.Option(help="Where tokens halt: layers that run before they are dropped.")
    ] = 1,
    data: DataOption = None,
) -> None:
    """Write a bundle that runs without torch, checked against torch on real samples."""
    if quantize not in (None, "int8"):
        raise InvalidArgumentError(f"--quantize must be int8. Got {quantize!r}.")
    from offramp.families import family_of
    from offramp.training.data import make_loader
    from offramp.training.run import CALIBRATION_SPLIT, load, load_batches

    loaded = load(run)
    recipe = loaded.require_recipe()
    family = family_of(loaded.network)
    if quantize is not None and family.thresholds is not None:
        raise InvalidArgumentError(
            f"--quantize is for networks with exits. {run} has one, and a threshold of "
            f"{family.settings}: export it in float32."
        )
    if loaded.policy is None:
        raise NotCalibratedError(
            f"The run {run} has no policy to export. Choose one: offramp calibrate {run} ..."
        )
    split = CALIBRATION_SPLIT if recipe.calibration_share else "train"
    batches = load_batches(recipe, split, data or loaded.data)[0].unaugmented()
    count = min(_PARITY_SAMPLES, 2 * batches.run_batch_size)
    spread = range(0, len(batches), max(1, len(batches) // count))
    samples, _ = batches.__getitems__(list(spread)[:count])
    folder = out or run / BUNDLE_FOLDER
    if quantize is None:
        _write_float(loaded, folder, samples, plain=plain, layers_per_step=layers_per_step)
    else:
        loader = make_loader(batches, batch_size=batches.run_batch_size)
        _write_int8(loaded, folder, samples, loader, plain=plain)
    print(f"exported {run}: {folder}")


def _write_float(
    loaded: Run, folder: Path, samples: Tensor, *, plain: bool, layers_per_step: int = 1
) -> None:
    from offramp.exporting.bundle import check_parity
    from offramp.exporting.bundle import export as write
    from offramp.runtime import Session

    assert loaded.policy is not None  # the command has made sure
    bundle = write(
        loaded.network,
        loaded.policy,
        folder,
        samples,
        class_names=loaded.class_names,
        recipe=loaded.require_recipe().to_dict(),
        plain=plain,
        layers_per_step=layers_per_step,
    )
    agreement = check_parity(Session(bundle), loaded.network, loaded.policy, samples)
    print(
        f"{bundle.num_steps} steps answer {len(samples)} samples as torch does: "
        f"logits within {max(agreement.differences):.1g}, {agreement.moved} went another way"
    )


def _write_int8(
    loaded: Run, folder: Path, samples: Tensor, loader: DataLoader[Any], *, plain: bool
) -> None:
    """Quantise, and say what that does to accuracy and to who leaves where."""
    from offramp.exporting.quantize import quantize
    from offramp.inference.evaluate import answer
    from offramp.runtime import Session

    num_exits = loaded.network.num_exits
    with tempfile.TemporaryDirectory() as scratch:
        float_folder = Path(scratch) / "float32"
        _write_float(loaded, float_folder, samples, plain=plain)
        quantize(float_folder, folder, samples)
        before = answer(Session(float_folder), loader)
    _report("float32", before, num_exits)
    after = answer(Session(folder), loader)
    _report("int8", after, num_exits)
    calibration = loaded.calibration or {}
    if _moved(before, after, num_exits) and _choose_anew(folder, loader, calibration):
        _report("anew", answer(Session(folder), loader), num_exits)
    if calibration.get("guarantee"):
        print("the guarantee was tested in float32; it promises nothing about int8")


def _moved(before: Answers, after: Answers, num_exits: int) -> bool:
    shares = zip(before.shares(num_exits), after.shares(num_exits), strict=True)
    return any(abs(one - other) > _SHARE_TOLERANCE for one, other in shares)


def _choose_anew(folder: Path, loader: DataLoader[Any], calibration: dict[str, Any]) -> bool:
    """Choose thresholds for the int8 network, which other samples leave than before.

    Returns:
        Whether there was a target to choose for, and no more to it than thresholds.
    """
    from offramp.calibration.collect import collect_from_session
    from offramp.calibration.thresholds import choose_policy
    from offramp.policy.confidence import PIXEL_SHARE
    from offramp.runtime import Session, with_thresholds
    from offramp.runtime.bundle import write_bundle

    asked = calibration.get("asked") or {}
    target = {name: asked[name] for name in (*TARGETS, "risk") if asked.get(name) is not None}
    needs_more = any(asked.get(name) for name in _BEYOND_THRESHOLDS)
    needs_more |= bool((calibration.get("data") or {}).get("weighted"))
    needs_more |= asked.get("rule") in (LEARNED, PIXEL_SHARE)
    if not target or needs_more:
        how = "set by hand" if "thresholds" in asked or not asked else "chosen for float32"
        print(f"shares moved by more than {_SHARE_TOLERANCE}; the thresholds were {how} and stay")
        return False
    session = Session(folder)
    chosen = choose_policy(collect_from_session(session, loader), rule=asked["rule"], **target)
    write_bundle(with_thresholds(session.bundle, chosen.policy.thresholds))
    return True


def _report(name: str, answers: Answers, num_exits: int) -> None:
    shares = " / ".join(f"{share:.3f}" for share in answers.shares(num_exits))
    print(
        f"{name:8} accuracy {percent(answers.accuracy)}  shares {shares}  "
        f"mean MACs {answers.mean_macs:,.0f}"
    )
