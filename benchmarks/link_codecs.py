"""What crosses each cut in each codec, and what that does to accuracy.

RUN has a bundle. Test samples go through the stages up to each cut in batches; survivors are
written by each codec as the HTTP link writes them, tensors and JSON together, read again, and
answered by the stages behind. Bytes are per survivor; beside them stands the input itself, in 8
bits a number where it came from an image. `offramp plan` names the cut that pays on a link.

    OFFRAMP_DATA=... python benchmarks/link_codecs.py RUN [--batch-size 256] [--json FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
import zstandard
from rich.console import Console
from rich.table import Table

from offramp.data.images import make_loader
from offramp.data.sources import SOURCES
from offramp.offload.codec import CODECS, Codec, decode, encode
from offramp.runs.run import load_batches
from offramp.runtime import Bundle, read_bundle
from offramp.runtime.bundle import find_bundle
from offramp.runtime.part import PartSession, carried_specs, cuts
from offramp.serving.http_client import write_request
from offramp.workflow.recipe_samples import recipe_of
from record import circumstances, write_json

Array = npt.NDArray[Any]
ZSTD_LEVEL = 1


def payload_bytes(encoded: list[Array], names: list[str], codec: Codec) -> int:
    """What the link would send as a body."""
    body, _ = write_request(dict(zip(names, encoded, strict=True)), {"deadline_ms": 1000.0})
    return len(
        zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(body) if codec.compresses else body
    )


def judge_cut(
    bundle: Bundle, session: PartSession, batches: list[tuple[Array, Array]], cut: int
) -> list[dict[str, Any]]:
    """Accuracy over all samples, and bytes per survivor, of every codec at a cut."""
    number = cuts(bundle).index(cut)
    step = bundle.steps[number]
    names = [spec.name for spec in carried_specs(bundle, number)]
    local = PartSession(bundle, split_after=cut, threads=1) if cut >= 0 else None
    right = dict.fromkeys(CODECS, 0)
    sent = dict.fromkeys(CODECS, 0)
    samples = survivors = 0
    for inputs, labels in batches:
        samples += len(labels)
        if local is None:
            rows, carried, answered = np.arange(len(labels)), [inputs], None
        else:
            part = local.run([inputs])
            rows, carried, answered = part.rows, part.carried, part.output
        survivors += len(rows)
        for name, codec in CODECS.items():
            output = None if answered is None else answered.copy()
            if len(rows):
                encoded = encode(carried, step, codec)
                sent[name] += payload_bytes(encoded, names, codec)
                behind = session.run(decode(encoded, step), starts_after=cut).output
                output = behind if output is None else output
                output[rows] = behind
            right[name] += int((output.argmax(1) == labels).sum())
    return [
        {
            "split_after": cut,
            "codec": name,
            "survivors": survivors / samples,
            "bytes_per_survivor": sent[name] / max(1, survivors),
            "accuracy": right[name] / samples,
        }
        for name in CODECS
    ]


def print_rows(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in ("cut after", "cross", "codec", "bytes", "times fewer", "accuracy", "lost"):
        table.add_column(column, justify="right")
    for row in rows:
        exact = next(
            r for r in rows if (r["split_after"], r["codec"]) == (row["split_after"], "float32")
        )
        table.add_row(
            str(row["split_after"]),
            f"{100 * row['survivors']:.1f} %",
            row["codec"],
            f"{row['bytes_per_survivor']:,.0f}",
            f"{exact['bytes_per_survivor'] / row['bytes_per_survivor']:.2f}",
            f"{100 * row['accuracy']:.2f} %",
            f"{100 * (exact['accuracy'] - row['accuracy']):.2f}",
        )
    Console().print(table)


def main(
    run: Annotated[Path, typer.Argument(help="A run with a bundle, or a bundle.")],
    batch_size: Annotated[int, typer.Option(help="Samples that come at once.")] = 256,
    data: Annotated[str | None, typer.Option(help="Folder with the Parquet files.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    bundle = read_bundle(find_bundle(run))
    recipe = recipe_of(bundle)
    test = load_batches(recipe, SOURCES[recipe.data].judging_split, data)[0]
    loader = make_loader(test, batch_size=batch_size)
    batches = [(inputs.numpy(), labels.numpy()) for inputs, labels in loader]
    session = PartSession(bundle, threads=1)
    rows = [row for cut in cuts(bundle)[:-1] for row in judge_cut(bundle, session, batches, cut)]
    numbers = int(np.prod(batches[0][0].shape[1:]))
    print_rows(rows, f"{recipe.name}, {batch_size} at once; the image itself: {numbers:,} bytes")
    if json_file is not None:
        settings = {"run": run.name, "batch_size": batch_size, "image_bytes": numbers}
        write_json({**circumstances(), **settings, "rows": rows}, json_file)


if __name__ == "__main__":
    typer.run(main)
