"""``offramp plan``: where to cut a network between an edge and a cloud."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from offramp.artifacts import atomic_path
from offramp.cli.options import write_figures
from offramp.cli.server_options import Plan
from offramp.drawing.cut_costs import draw_bars
from offramp.measure.arrays import as_array
from offramp.offload.calls import plan_bundle
from offramp.offload.plan import CutCost, best_cut
from offramp.runtime import Bundle
from offramp.runtime.bundle import find_bundle
from offramp.runtime.step_profile import profile_steps, read_step_profile
from offramp.tables import percent
from offramp.workflow.artifact import Artifact, open_artifact
from offramp.workflow.samples import CALIBRATION

Array = npt.NDArray[Any]


def plan(asked: Plan) -> None:
    """Print what each cut costs."""
    link, codec, threads = asked.link, asked.codec, asked.threads
    opened = open_artifact(find_bundle(asked.run))
    session: Any = opened.runner
    bundle: Bundle = session.bundle
    samples = _calibration_samples(opened, asked)
    edge = _step_ms(bundle, asked.edge_profile, threads, samples)
    if asked.edge_ms is not None:
        edge = [ms * asked.edge_ms / sum(edge) for ms in edge]
    cloud = _step_ms(bundle, asked.cloud_profile, threads, samples)
    cuts = plan_bundle(
        bundle, samples, edge_ms=edge, cloud_ms=cloud, link=link, codec=codec, threads=threads
    )
    if asked.json_file != "-":
        _print_table(cuts, f"{link.mbit:g} Mbit/s, {link.rtt_ms:g} ms there and back, {codec}")
    if asked.picture is not None:
        with atomic_path(asked.picture) as temporary:
            draw_bars(cuts).save(temporary, format="PNG")
        print(f"drawn: {asked.picture}", file=sys.stderr)
    if asked.json_file is not None:
        content = {"link": asdict(link), "cuts": [asdict(cut) for cut in cuts]}
        write_figures(content, asked.json_file)


def _calibration_samples(opened: Artifact, asked: Plan) -> list[Array]:
    """The samples that chose the thresholds, or that might have: exit shares come from them."""
    split = asked.split or (None if opened.samples.has_calibration else "train")
    samples = opened.samples.load(
        split, data=asked.data, subset=asked.subset, preferred=CALIBRATION
    )
    batches = samples.batches
    inputs, _ = batches.__getitems__(list(range(min(len(batches), 16 * batches.run_batch_size))))
    several = inputs if isinstance(inputs, tuple) else (inputs,)
    return [as_array(each) for each in several]


def _step_ms(
    bundle: Bundle, profile: Path | None, threads: int | None, samples: Sequence[Array]
) -> list[float]:
    if profile is not None:
        return list(read_step_profile(profile, bundle).step_ms)
    return list(profile_steps(bundle, threads=threads, inputs=[t[:1] for t in samples]).step_ms)


def _print_table(cuts: list[CutCost], title: str) -> None:
    best = best_cut(cuts)
    table = Table(title=title)
    for column in ("on the edge", "cross", "bytes", "edge", "link", "cloud", "mean ms", "p95 ms"):
        table.add_column(column, justify="right")
    table.add_column("")
    for cut in cuts:
        is_first, is_last = cut.split_after == -1, cut.codec is None
        stages = "nothing" if is_first else "all" if is_last else f"stages 0-{cut.split_after}"
        times = (cut.edge_ms, cut.link_ms, cut.cloud_ms, cut.mean_ms, cut.p95_ms)
        table.add_row(
            stages,
            percent(cut.offloaded_share),
            f"{cut.bytes_per_request:,.0f}",
            *(f"{ms:.2f}" for ms in times),
            "best" if cut is best else "",
        )
    Console().print(table)
    print(f"best: --split-after {best.split_after}")
