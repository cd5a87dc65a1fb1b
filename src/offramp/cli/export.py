"""``offramp export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli.options import DataOption, RunFolder
from offramp.errors import InvalidArgumentError
from offramp.tables import percent

if TYPE_CHECKING:
    from offramp.evaluation.evaluate import Answers
    from offramp.workflow.export import Exported


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
    from offramp.workflow.export import export as write

    exported = write(
        run,
        out,
        int8=quantize is not None,
        plain=plain,
        layers_per_step=layers_per_step,
        data=data,
    )
    agreement = exported.agreement
    print(
        f"{exported.num_steps} steps answer {exported.num_samples} samples as torch does: "
        f"logits within {max(agreement.differences):.1g}, {agreement.moved} went another way"
    )
    _print_quantized(exported)
    print(f"exported {run}: {exported.folder}")


def _print_quantized(exported: Exported) -> None:
    from offramp.workflow.export import SHARE_TOLERANCE

    found, num_exits = exported.quantized, exported.num_exits
    if found is None:
        return
    _report("float32", found.before, num_exits)
    _report("int8", found.after, num_exits)
    if found.kept is not None:
        print(
            f"shares moved by more than {SHARE_TOLERANCE}; the thresholds were {found.kept} and "
            "stay"
        )
    if found.anew is not None:
        _report("anew", found.anew, num_exits)
    if found.had_guarantee:
        print("the guarantee was tested in float32; it promises nothing about int8")


def _report(name: str, answers: Answers, num_exits: int) -> None:
    shares = " / ".join(f"{share:.3f}" for share in answers.shares(num_exits))
    print(
        f"{name:8} accuracy {percent(answers.accuracy)}  shares {shares}  "
        f"mean MACs {answers.mean_macs:,.0f}"
    )
