"""``offramp plan``: where to cut a network between an edge and a cloud."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.artifacts import atomic_path
from offramp.cli.options import DataOption, JsonOption, RunOrBundle, write_figures
from offramp.cli.server_options import needs_extra
from offramp.errors import InvalidArgumentError
from offramp.tables import percent
from offramp.workflow.artifact import find_bundle

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from offramp.offload.plan import CutCost
    from offramp.runtime import Bundle

    Array = npt.NDArray[Any]


def plan(
    run: RunOrBundle,
    mbit: Annotated[float, typer.Option(help="The link's megabits a second, each way.")],
    rtt_ms: Annotated[float, typer.Option(help="The link's milliseconds there and back.")],
    codec: Annotated[
        str, typer.Option(help="How features cross: float32, float16, int8 or int8+zstd.")
    ] = "int8+zstd",
    edge_profile: Annotated[
        Path | None,
        typer.Option(help="What offramp time BUNDLE --steps wrote on the edge; else this machine."),
    ] = None,
    cloud_profile: Annotated[
        Path | None, typer.Option(help="The same of the cloud; else this machine.")
    ] = None,
    edge_ms: Annotated[
        float | None,
        typer.Option(help="Take the edge to need so long for all its stages, in this proportion."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads that compute here.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the cuts, a PNG.")] = None,
    data: DataOption = None,
    json_file: JsonOption = None,
) -> None:
    """Predict latency and bytes of every cut, all on the edge and all in the cloud included."""
    with needs_extra("plan", "serve"):
        from offramp.offload.calls import plan_bundle
    from offramp.offload.plan import LinkTerms
    from offramp.runtime import read_bundle

    link = LinkTerms(mbit=mbit, rtt_ms=rtt_ms)
    if edge_ms is not None and not edge_ms > 0:
        raise InvalidArgumentError(f"--edge-ms must be a number above 0. Got {edge_ms}.")
    bundle = read_bundle(find_bundle(run))
    samples = _calibration_samples(bundle, data)
    edge = _step_ms(bundle, edge_profile, threads, samples)
    if edge_ms is not None:
        edge = [ms * edge_ms / sum(edge) for ms in edge]
    cloud = _step_ms(bundle, cloud_profile, threads, samples)
    cuts = plan_bundle(
        bundle, samples, edge_ms=edge, cloud_ms=cloud, link=link, codec=codec, threads=threads
    )
    if json_file != "-":
        _print_table(cuts, f"{mbit:g} Mbit/s, {rtt_ms:g} ms there and back, {codec}")
    if picture is not None:
        from offramp.drawing.cut_costs import draw_bars

        if picture.suffix.lower() != ".png":
            raise InvalidArgumentError(f"--picture must be a PNG file. Got {picture}.")
        with atomic_path(picture) as temporary:
            draw_bars(cuts).save(temporary, format="PNG")
        print(f"drawn: {picture}", file=sys.stderr)
    if json_file is not None:
        write_figures({"link": asdict(link), "cuts": [asdict(cut) for cut in cuts]}, json_file)


def _calibration_samples(bundle: Bundle, data: str | None) -> Array:
    """The samples that chose the thresholds, or that might have: exit shares come from them."""
    from offramp.runs.run import CALIBRATION_SPLIT, load_batches
    from offramp.workflow.artifact import recipe_of

    recipe = recipe_of(bundle)
    split = CALIBRATION_SPLIT if recipe.calibration_share else "train"
    batches = load_batches(recipe, split, data)[0].unaugmented()
    inputs, _ = batches.__getitems__(list(range(min(len(batches), 16 * batches.run_batch_size))))
    array: np.ndarray[Any, Any] = inputs.numpy()
    return array


def _step_ms(
    bundle: Bundle, profile: Path | None, threads: int | None, samples: Array
) -> list[float]:
    from offramp.runtime.step_profile import profile_steps, read_step_profile

    if profile is not None:
        return list(read_step_profile(profile, bundle).step_ms)
    return list(profile_steps(bundle, threads=threads, inputs=[samples[:1]]).step_ms)


def _print_table(cuts: list[CutCost], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from offramp.offload.plan import best_cut

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
