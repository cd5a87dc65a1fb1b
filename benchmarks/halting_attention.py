"""Milliseconds of attention within each sample of a packed batch, by the means there are.

Tokens of all samples lie one after the other. Means: ``one by one``, a call for each sample;
``padded``, to the longest, with a mask; ``sorted``, by length into four groups that are padded;
``nested``, torch's jagged tensors; ``block mask``, one call over all tokens; ``packing``, what
``HaltingRunner`` uses: a call for all samples that have the same multiple of 16 tokens once they
are padded. All are first compared with ``one by one``. Medians over the rounds, in one process, in
turn.

    python benchmarks/halting_attention.py [--rounds 15] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from offramp.families.packing import Packing
from offramp.routing.layers import attend
from record import circumstances, write_json

CPU = torch.device("cpu")
MOST_TOKENS = 4096
"""Where there are more, a mask over all pairs is left out."""


class Case(NamedTuple):
    """A batch.

    Attributes:
        name: What it is like.
        samples: How many.
        tokens: Of each, before any halts.
        width: Of a token.
        heads: Of attention.
        share: Of the tokens that are left, on average.
        spread: Shares differ by as much in both directions.
    """

    name: str
    samples: int
    tokens: int
    width: int
    heads: int
    share: float
    spread: float


CASES = tuple(
    Case(name, *shape, share, spread)
    for name, *shape in (
        ("DeiT-tiny", 16, 197, 192, 3),
        ("emnist-avit", 64, 50, 96, 3),
        ("sst2-skim", 32, 24, 384, 12),
    )
    for share, spread in ((1.0, 0.0), (0.5, 0.05), (0.5, 0.25), (0.2, 0.1))
)

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def one_by_one(lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([attend(a[None], b[None], c[None], heads)[0] for a, b, c in parts])


def padded(lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    lengths_B = torch.tensor(lengths)
    is_token_BT = torch.arange(max(lengths)) < lengths_B[:, None]
    starts_B = lengths_B.cumsum(0) - lengths_B
    rows = torch.where(is_token_BT, starts_B[:, None] + torch.arange(max(lengths)), 0).flatten()
    shape = (*is_token_BT.shape, -1)
    qkv = (x.index_select(0, rows).reshape(shape) for x in (q, k, v))
    query, key, value = qkv
    context = attend(query, key, value, heads, is_key_BT=is_token_BT).flatten(0, 1)
    return context.index_select(0, is_token_BT.flatten().nonzero()[:, 0])


def sorted_groups(lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    context = torch.empty_like(q)
    size = -(-len(order) // 4)
    for first in range(0, len(order), size):
        group = order[first : first + size]
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in group])
        of_group = [lengths[i] for i in group]
        taken = (x.index_select(0, rows) for x in (q, k, v))
        context.index_copy_(0, rows, padded(of_group, *taken, heads))
    return context


def nested(lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    of_heads = (
        torch.nested.nested_tensor_from_jagged(
            x.contiguous().view(len(x), heads, -1),
            offsets,
            min_seqlen=min(lengths),
            max_seqlen=max(lengths),
        ).transpose(1, 2)
        for x in (q, k, v)
    )
    context = F.scaled_dot_product_attention(*of_heads)
    return context.transpose(1, 2).values().flatten(1)


def block_mask(lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    sample_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask_NN = sample_N[:, None] == sample_N
    of_heads = (x.reshape(1, len(x), heads, -1).transpose(1, 2) for x in (q, k, v))
    return (
        F.scaled_dot_product_attention(*of_heads, attn_mask=mask_NN)[0].transpose(0, 1).flatten(1)
    )


def packing(lengths: Sequence[int], q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return Packing(lengths, CPU).attend(q, k, v, heads)


WAYS = {
    "one by one": one_by_one,
    "padded": padded,
    "sorted": sorted_groups,
    "nested": nested,
    "block mask": block_mask,
    "packing": packing,
}


def _has_kernel(run: Callable[[], Tensor]) -> bool:
    """Whether torch can attend over jagged tensors like these on this processor."""
    try:
        run()
    except RuntimeError as error:
        if "No viable backend" not in str(error):
            raise
        return False
    return True


@torch.no_grad()
def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Milliseconds of every way, after it was compared with one call a sample."""
    shares = case.share + case.spread * (2 * torch.rand(case.samples) - 1)
    lengths = (shares * case.tokens).round().clamp(1, case.tokens).long().tolist()
    qkv = torch.randn(sum(lengths), 3 * case.width).chunk(3, dim=-1)
    expected = one_by_one(lengths, *qkv, case.heads)
    runs: dict[str, Callable[[], Tensor]] = {}
    for name, way in WAYS.items():
        if way is block_mask and sum(lengths) > MOST_TOKENS:
            continue
        runs[name] = partial(way, lengths, *qkv, case.heads)
        if way is nested and not _has_kernel(runs[name]):
            del runs[name]
            continue
        torch.testing.assert_close(runs[name](), expected, rtol=1e-4, atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    about = {"mean_tokens": sum(lengths) / len(lengths), "longest": max(lengths)}
    return {**case._asdict(), **about, "ms": {name: median(each) for name, each in times.items()}}


def main(
    rounds: Annotated[int, typer.Option(min=2)] = 15,
    threads: Annotated[int, typer.Option(min=1, help="That compute.")] = 1,
    seed: Annotated[int, typer.Option(help="Of lengths and tokens.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rows = [measure(case, rounds) for case in CASES]
    table = Table(title="attention within each sample: ms", box=box.SIMPLE_HEAD)
    for column in ("batch", "mean", "longest", *WAYS):
        table.add_column(column, justify="left" if column == "batch" else "right", no_wrap=True)
    for row in rows:
        shown = (f"{row['ms'][way]:.2f}" if way in row["ms"] else "" for way in WAYS)
        name = f"{row['samples']} of {row['name']}"
        table.add_row(name, f"{row['mean_tokens']:.0f}", str(row["longest"]), *shown)
    Console(width=120).print(table)
    if json_file is not None:
        write_json({**circumstances(), "rounds": rounds, "seed": seed, "batches": rows}, json_file)


if __name__ == "__main__":
    typer.run(main)
