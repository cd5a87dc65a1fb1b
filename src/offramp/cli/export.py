"""``offramp export``."""

from __future__ import annotations

from offramp.cli.options import Export
from offramp.evaluation.answers import Answers
from offramp.tables import percent
from offramp.workflow.export import SHARE_TOLERANCE, Exported
from offramp.workflow.export import export as write


def export(asked: Export) -> None:
    """Write a bundle and print how it compares with torch."""
    exported = write(
        asked.run,
        asked.out,
        int8=asked.quantize is not None,
        plain=asked.plain,
        layers_per_step=asked.layers_per_step,
        data=asked.data,
        network=asked.network,
    )
    agreement = exported.agreement
    print(
        f"{exported.num_steps} steps answer {exported.num_samples} samples as torch does: "
        f"logits within {max(agreement.differences):.1g}, {agreement.moved} went another way"
    )
    _print_quantized(exported)
    print(f"exported {asked.run}: {exported.folder}")


def _print_quantized(exported: Exported) -> None:
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
