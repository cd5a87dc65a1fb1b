"""Images a second through Offramp's loader and through the tutorial's per-image pipeline.

Both yield the same batches of 256 normalised images of emnist47's train split, in the same order.
Offramp indexes one uint8 tensor by batch. The tutorial makes a PIL image of every row, turns it
into a tensor, normalises that, and collates the batch in one worker process; torchvision's steps
are written out by hand here, without their argument checks. Decoding the Parquet file is left
out: both start from pixels in memory.

First every batch is compared, then whole epochs are timed in turn; medians over the rounds.

    OFFRAMP_DATA=... python benchmarks/loader.py [--data DIR] [--rounds 5] [--json FILE]

Bar: at least 20 times as many images a second.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from offramp.data.images import EpochSampler, ImageBatches, Normalisation, make_loader
from offramp.data.sources import load_split
from record import circumstances, write_json

BATCH_SIZE = 256
BAR = 20.0
SEED = 0

Batches = Iterable[tuple[Tensor, Tensor]]


class TutorialImages(Dataset[tuple[Tensor, int]]):
    """Image by image, as torchvision's EMNIST with ToTensor and Normalize does it."""

    def __init__(self, pixels_NHW: Tensor, labels_N: Tensor) -> None:
        self.pixels_NHW = pixels_NHW
        self.labels_N = labels_N

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.pixels_NHW[index].numpy())
        return normalize(to_tensor(image), (0.5,), (0.5,)), int(self.labels_N[index])


def to_tensor(image: Image.Image) -> Tensor:
    """A grey PIL image as floats in [0, 1], shape (1, H, W)."""
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
    pixels = pixels.view(image.size[1], image.size[0], 1).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255)


def normalize(image: Tensor, means: tuple[float, ...], deviations: tuple[float, ...]) -> Tensor:
    """Subtract each channel's mean and divide by its deviation."""
    mean_C11 = torch.as_tensor(means, dtype=image.dtype).view(-1, 1, 1)
    deviation_C11 = torch.as_tensor(deviations, dtype=image.dtype).view(-1, 1, 1)
    return image.clone().sub_(mean_C11).div_(deviation_C11)


def make_contenders(data: str | None) -> tuple[dict[str, Batches], int]:
    """Both loaders over the same images in the same order, and how many images there are."""
    split = load_split("emnist47", "train", data)
    labels_N = split.labels_N
    batches = ImageBatches(split.store, labels_N, normalise=Normalisation(mean=0.5, deviation=0.5))
    per_image = TutorialImages(split.store[torch.arange(len(labels_N))][:, 0], labels_N)
    order = EpochSampler(labels_N, seed=SEED)
    contenders: dict[str, Batches] = {
        "offramp": make_loader(batches, batch_size=BATCH_SIZE, sampler=order),
        "tutorial": DataLoader(per_image, batch_size=BATCH_SIZE, sampler=order, num_workers=1),
    }
    return contenders, len(labels_N)


def check_equal_batches(contenders: dict[str, Batches]) -> None:
    """Compare every batch; floats may differ in the last bits."""
    for ours, theirs in zip(contenders["offramp"], contenders["tutorial"], strict=True):
        torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(ours[1], theirs[1])


def seconds_an_epoch(batches: Batches) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def main(
    data: Annotated[str | None, typer.Option(help="Folder with train.parquet.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Epochs of each loader.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    contenders, num_images = make_contenders(data)
    check_equal_batches(contenders)  # also the warm-up
    print(f"both loaders yield the same {num_images:,} images in the same batches")

    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, batches in contenders.items():
            rates[name].append(num_images / seconds_an_epoch(batches))
    figures = {
        name: {
            "images_per_s": round(median(values)),
            "interval_images_per_s": [round(quantiles(values, n=4)[i]) for i in (0, 2)],
        }
        for name, values in rates.items()
    }
    ratio = median(rates["offramp"]) / median(rates["tutorial"])

    around = circumstances()
    table = Table(title=f"emnist47 train, batches of {BATCH_SIZE}, medians of {rounds} epochs")
    for column in ("loader", "images a second", "quartiles"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for name, row in figures.items():
        low, high = row["interval_images_per_s"]
        table.add_row(name, f"{row['images_per_s']:,}", f"{low:,} to {high:,}")
    Console().print(table)
    print(f"ratio {ratio:.1f} (bar {BAR:.0f}: {'met' if ratio >= BAR else 'MISSED'})")
    print(f"{around['hardware']}, {around['threads']} threads, torch {torch.__version__}")
    if json_file is not None:
        content = {"batch_size": BATCH_SIZE, "num_images": num_images, "rounds": rounds}
        write_json(
            {**around, "seed": SEED, **content, "results": figures, "ratio": ratio, "bar": BAR},
            json_file,
        )


if __name__ == "__main__":
    typer.run(main)
