"""Milliseconds a sentence, from text to answer: leaving early against the plain network.

Both run in onnxruntime, one sentence at a time, tokenising counted on both sides, on the same real
test sentences in the same order, turn by turn. First the answers are checked: leaving early against
the bundle's own steps all run, the plain network against the last step.

    OFFRAMP_DATA=... python benchmarks/text_clock.py BUNDLE [--threads 2] [--rounds 9] [--json FILE]

Bar: at least 1.4 times as fast as the plain network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from offramp.calibration.collect import collect_from_session
from offramp.data.sources import TextSplit, load_split
from offramp.data.texts import encode
from offramp.recipes.recipe import Recipe
from offramp.runtime import Session, read_bundle
from offramp.runtime.session import PlainSession
from offramp.zoo.text import load_tokenizer
from record import circumstances, write_json

BAR = 1.4
SENTENCES = 500


def check(session: Session, plain: PlainSession, tokens: Sequence[torch.Tensor]) -> None:
    """Refuse to time what does not answer alike."""
    none = torch.zeros(1, dtype=torch.int64)
    every_exit = collect_from_session(session, [(ids[None], none) for ids in tokens])
    early = [session.run(ids[None].numpy()) for ids in tokens]
    position = {number: k for k, number in enumerate(every_exit.numbers)}
    for row, (answer, ids) in enumerate(zip(early, tokens, strict=True)):
        own = every_exit.logits_KNC[position[int(answer.exit_index[0])], row].numpy()
        np.testing.assert_allclose(answer.output[0], own, atol=1e-4)
        final = every_exit.logits_KNC[-1, row].numpy()
        np.testing.assert_allclose(plain.run(ids[None].numpy())[0], final, atol=1e-4)


def time_in_turn(
    contenders: dict[str, Callable[[str], object]], texts: Sequence[str], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds a sentence of each contender, a number a round; the first round is left out."""
    laps: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, answer in contenders.items():
            start = time.perf_counter()
            for text in texts:
                answer(text)
            laps[name].append(1e3 * (time.perf_counter() - start) / len(texts))
    return {name: values[1:] for name, values in laps.items()}


def main(
    bundle: Path,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=2)] = 9,
    data: str | None = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time a bundle of a text recipe."""
    torch.set_num_threads(threads)
    about = read_bundle(bundle)
    assert about.recipe is not None
    split = load_split(Recipe.from_dict(about.recipe).data, "test", data)
    assert isinstance(split, TextSplit)
    texts = split.texts[:SENTENCES]
    tokenizer = load_tokenizer()
    session, plain = Session(about, threads=threads), PlainSession(about, threads=threads)
    check(session, plain, encode(tokenizer, texts))

    def ids_of(text: str) -> np.ndarray:
        return np.array([tokenizer.encode(text).ids])

    laps = time_in_turn(
        {
            "tokenising alone": ids_of,
            "plain": lambda text: plain.run(ids_of(text)),
            "leaving early": lambda text: session.run(ids_of(text)),
        },
        texts,
        rounds,
    )
    middle = {name: median(values) for name, values in laps.items()}
    gain = middle["plain"] / middle["leaving early"]
    table = Table(title=f"milliseconds a sentence, {len(texts)} sentences, {rounds} rounds")
    for column in ("", "median", "quartiles"):
        table.add_column(column)
    for name, values in laps.items():
        low, _, high = quantiles(values, n=4)
        table.add_row(name, f"{middle[name]:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(table)
    print(f"{gain:.2f} times as fast as the plain network (bar {BAR})")
    if json_file is not None:
        figures = {"sentences": len(texts), "ms": middle, "gain": gain, "bar": BAR}
        write_json({**circumstances(), **figures}, json_file)


if __name__ == "__main__":
    typer.run(main)
