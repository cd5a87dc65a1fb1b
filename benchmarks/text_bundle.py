"""Does the bundle of a RoBERTa say what torch says? Batches of 1 and 8, padded on either side.

A RoBERTa from its configuration, of RoBERTa-base's size unless told otherwise, gets an exit after
every second layer, is trained for a few steps on made-up texts and exported. Every length is run
with texts of unequal length, padded on the right and on the left; the largest difference from
torch's logits, of the exit where each text left, is printed and written.

    python benchmarks/text_bundle.py [--layers 12] [--width 768] [--steps 4] [--json FILE]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import RobertaConfig, RobertaForSequenceClassification

import offramp as off
from record import circumstances, write_json

CLASSES, PAD = 2, 1
LENGTHS, BATCH_SIZES = (8, 32, 128), (1, 8)


def texts(count: int, length: int, *, pads: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and masks of texts of unequal length, the first the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(5, 1000, (count, length), generator=generator)
    lengths_B = torch.randint(length // 2, length + 1, (count,), generator=generator)
    lengths_B[0] = length
    mask_BT = (torch.arange(length) < lengths_B[:, None]).long()
    if pads == "left":
        mask_BT = mask_BT.flip(1)
    return torch.where(mask_BT == 1, ids_BT, PAD), mask_BT


def train(network: off.MultiExitNetwork, steps: int) -> None:
    """Move the weights by a few steps of the joint loss."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    network.train()
    for step in range(steps):
        ids_BT, mask_BT = texts(8, 32, pads="right", seed=step)
        labels_B = ids_BT[:, 0] % CLASSES
        losses = [
            torch.nn.functional.cross_entropy(logits, labels_B)
            for logits in network(ids_BT, mask_BT)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    network.eval()


def compare(network: off.MultiExitNetwork, session: off.Session) -> list[dict[str, Any]]:
    """Largest differences between bundle and torch, by length, batch size and side of padding."""
    rows = []
    for length in LENGTHS:
        for batch_size in BATCH_SIZES:
            for pads in ("right", "left"):
                ids_BT, mask_BT = texts(batch_size, length, pads=pads, seed=length)
                with torch.no_grad():
                    exits = torch.stack(network(ids_BT, mask_BT))
                answer = session.run(ids_BT.numpy(), mask_BT.numpy())
                left = torch.from_numpy(answer.exit_index)
                expected = exits[left, torch.arange(batch_size)]
                gap = (torch.from_numpy(answer.output) - expected).abs().max().item()
                rows.append(
                    {"length": length, "batch_size": batch_size, "pads": pads, "largest": gap}
                )
    return rows


def main(
    layers: Annotated[int, typer.Option(help="Layers of the RoBERTa.")] = 12,
    width: Annotated[int, typer.Option(help="Width of the RoBERTa.")] = 768,
    steps: Annotated[int, typer.Option(help="Training steps before the export.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write.")] = None,
) -> None:
    """Train a little, export, and compare."""
    torch.manual_seed(0)
    config = RobertaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=514,
        num_labels=CLASSES,
    )
    started = time.perf_counter()
    network = off.add_exits(
        RobertaForSequenceClassification(config),
        at=[f"roberta.encoder.layer.{k}" for k in range(1, layers - 1, 2)],
        num_classes=CLASSES,
        example=texts(2, 32, pads="right", seed=0),
    )
    cut_s = time.perf_counter() - started
    train(network, steps)
    # The middle of what the first exit says of one batch: some texts leave there, some go on.
    with torch.no_grad():
        sure = network(*texts(8, 32, pads="right", seed=32))[0].softmax(1).amax(1)
    threshold = float(sure.median())
    policy = off.ThresholdPolicy(
        (threshold, *[1.0] * (network.num_exits - 2)), rule="max_probability"
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        bundle = off.export(
            network, policy, Path(folder) / "bundle", texts(8, 32, pads="right", seed=1)
        )
        export_s = time.perf_counter() - started
        rows = compare(network, off.Session(bundle))
    for row in rows:
        print(row)
    worst = max(row["largest"] for row in rows)
    print(
        f"{network.num_exits} exits, cut {cut_s:.0f} s, export {export_s:.0f} s, worst {worst:.1e}"
    )
    if json_file is not None:
        figures = {"exits": network.num_exits, "cut_s": cut_s, "export_s": export_s, "rows": rows}
        write_json(circumstances() | {"layers": layers, "width": width} | figures, json_file)


if __name__ == "__main__":
    typer.run(main)
