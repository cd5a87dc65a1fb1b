"""Stopping a segmentation network: which of five confidences saves most at equal mean IoU?

For a row of drops of mean IoU, each rule's thresholds are chosen on the calibration images and
judged on the judging split. Two questions:

- at one drop (--drop): what does each rule reach, with thresholds that the judging images did not
  choose, and is it better than a smaller plain network (--rival)?
- at equal mean IoU: how many MACs does each rule need to stay within that drop of the final exit,
  read between its points on the judging split, and how many more than the poster's share of sure
  pixels?

Intervals are of 95 %, by drawing the judging images with replacement; all rules and the rival are
judged on the same draws. A difference whose interval holds 0 is not significant. The images that
chose the thresholds are not drawn anew, so the intervals say nothing about another choice. Frames
of one street drive resemble their neighbours: the true intervals are wider.

    python benchmarks/pixel_rules.py RUN [--rival RUN] [--drop 0.005] [--draws 2000] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from offramp import DenseLogits, calibrate, collect, load, mean_iou
from offramp.calibration.search import exits_left_by
from offramp.calibration.thresholds import confidences
from offramp.data.images import make_loader
from offramp.data.sources import SOURCES
from offramp.policy.confidence import AGREEMENT, DENSE_RULES, PIXEL_SHARE
from offramp.policy.policies import ThresholdedPolicy
from offramp.runs.run import CALIBRATION_SPLIT, Run, load_batches
from record import circumstances, write_json

RULES = (*DENSE_RULES, AGREEMENT)
DROPS = (0.0, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
"""Of mean IoU on the calibration images: they lead to the points of a rule's curve."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What policies do with the judging images.

    Attributes:
        confusion_PNCC: Pixels of each image by true and predicted class, under each policy.
        macs_PN: MACs of each image under each policy.
    """

    confusion_PNCC: torch.Tensor
    macs_PN: Floats

    def figures(self, weights_DN: Floats) -> tuple[Floats, Floats]:
        """Mean IoU and mean MACs of each policy in each draw of the images, shape (D, P)."""
        num_policies, num_images, num_classes, _ = self.confusion_PNCC.shape
        flat_PNX = self.confusion_PNCC.reshape(num_policies, num_images, -1).double()
        summed_DPX = torch.einsum("dn,pnx->dpx", torch.from_numpy(weights_DN), flat_PNX)
        ious_DP = mean_iou(summed_DPX.unflatten(-1, (num_classes, num_classes)))
        return ious_DP.numpy(), weights_DN @ self.macs_PN.T / num_images


def judge(logits: DenseLogits, policies: list[ThresholdedPolicy]) -> Judged:
    """Let each image leave where each policy says."""
    images = torch.arange(len(logits.labels_N))
    confusion, macs = [], []
    for policy in policies:
        off = policy.off_exits
        exit_N = exits_left_by(confidences(logits, policy, off), policy.thresholds)
        confusion.append(logits.confusion_KNCC[torch.from_numpy(exit_N), images])
        macs.append(np.array(logits.costs.exit_macs(off), dtype=np.float64)[exit_N])
    return Judged(confusion_PNCC=torch.stack(confusion), macs_PN=np.stack(macs))


def macs_at(iou_P: Floats, macs_P: Floats, wanted: float, otherwise: float) -> float:
    """The least MACs at which a curve reaches a mean IoU, read between its points."""
    order = np.argsort(macs_P, kind="stable")
    iou_P, macs_P = iou_P[order], macs_P[order]
    enough = np.flatnonzero(iou_P >= wanted)
    if not len(enough):
        return otherwise
    j = int(enough[0])
    if j == 0:
        return float(macs_P[0])
    share = (wanted - iou_P[j - 1]) / (iou_P[j] - iou_P[j - 1])
    return float(macs_P[j - 1] + share * (macs_P[j] - macs_P[j - 1]))


def interval(values_D: Floats) -> dict[str, Any]:
    """The figure on the images as they are, which is the first draw, and its interval."""
    low, high = np.quantile(values_D[1:], (0.025, 0.975))
    return {"value": float(values_D[0]), "interval": [float(low), float(high)]}


def collect_split(run: Run, split: str) -> DenseLogits:
    """Every exit's answers to a split of the run's data."""
    batches, _, _ = load_batches(run.require_recipe(), split, run.data)
    logits = collect(run.network, make_loader(batches, batch_size=batches.run_batch_size))
    assert isinstance(logits, DenseLogits)
    return logits


def draws(num_images: int, num_draws: int) -> Floats:
    """How often each image is drawn; once in the first draw."""
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(num_images, np.full(num_images, 1 / num_images), num_draws)
    return np.concatenate([np.ones((1, num_images)), drawn.astype(np.float64)])


def compare(
    calibration: DenseLogits, judging: DenseLogits, weights_DN: Floats, drop: float
) -> dict[str, dict[str, Any]]:
    """The figures of each rule."""
    plain_macs = judging.costs.plain_macs
    everybody = np.ones(len(judging.labels_N), dtype=np.int64)
    final = judging.confusion_KNCC[-1:]
    final_D = Judged(confusion_PNCC=final, macs_PN=plain_macs * everybody[None].astype(float))
    wanted_D = final_D.figures(weights_DN)[0][:, 0] - drop
    found, needed = {}, {}
    for rule in RULES:
        chosen = [calibrate(calibration, max_drop=each, rule=rule).policy for each in DROPS]
        at_drop = calibrate(calibration, max_drop=drop, rule=rule).policy
        iou_DP, macs_DP = judge(judging, [at_drop, *dict.fromkeys(chosen)]).figures(weights_DN)
        needed[rule] = np.array(
            [
                macs_at(iou_P[1:], macs_P[1:], wanted, plain_macs) / plain_macs
                for iou_P, macs_P, wanted in zip(iou_DP, macs_DP, wanted_D, strict=True)
            ]
        )
        found[rule] = {
            "policy": str(at_drop),
            "mean_iou": interval(iou_DP[:, 0]),
            "drop": interval(wanted_D + drop - iou_DP[:, 0]),
            "macs_share": interval(macs_DP[:, 0] / plain_macs),
            "macs_share_at_equal_mean_iou": interval(needed[rule]),
        }
    for rule in RULES:
        found[rule]["more_than_pixel_share"] = interval(needed[rule] - needed[PIXEL_SHARE])
    return found


def against_rival(
    calibration: DenseLogits, judging: DenseLogits, rival: DenseLogits, weights_DN: Floats
) -> dict[str, Any]:
    """The poster's rule within the rival's MACs, and how much mean IoU it has over the rival."""
    chosen = calibrate(calibration, budget_macs=rival.costs.plain_macs)
    iou_DP, macs_DP = judge(judging, [chosen.policy]).figures(weights_DN)
    alone = Judged(
        confusion_PNCC=rival.confusion_KNCC[-1:], macs_PN=np.zeros((1, len(rival.labels_N)))
    )
    rival_D = alone.figures(weights_DN)[0][:, 0]
    return {
        "plain_macs": rival.costs.plain_macs,
        "policy": str(chosen.policy),
        "mean_macs": interval(macs_DP[:, 0]),
        "mean_iou": interval(iou_DP[:, 0]),
        "rival_mean_iou": interval(rival_D),
        "gain": interval(iou_DP[:, 0] - rival_D),
    }


def show(rules: Mapping[str, Mapping[str, Any]], drop: float) -> None:
    """Print a table."""

    def shown(figure: Mapping[str, Any]) -> str:
        low, high = figure["interval"]
        return f"{100 * figure['value']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"

    table = Table(title=f"drop {100 * drop:g} points; percent, with 95 % intervals", box=box.SIMPLE)
    columns = ("mean IoU", "drop", "MACs", "MACs at equal mean IoU", "more than pixel_share")
    for column in ("rule", *columns):
        table.add_column(column)
    names = ("mean_iou", "drop", "macs_share", "macs_share_at_equal_mean_iou")
    for rule, figures in rules.items():
        cells = [shown(figures[name]) for name in (*names, "more_than_pixel_share")]
        table.add_row(rule, *cells)
    Console(width=160).print(table)


def main(
    run: Annotated[Path, typer.Argument(help="A run of a segmentation recipe.")],
    rival: Annotated[Path | None, typer.Option(help="A smaller plain network's run.")] = None,
    drop: Annotated[float, typer.Option(help="Of mean IoU, a fraction.")] = 0.005,
    draws_: Annotated[int, typer.Option("--draws", help="Of the judging images.")] = 2000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    """Compare the rules, and print and write what was found."""
    loaded = load(run)
    recipe = loaded.require_recipe()
    split = SOURCES[recipe.data].judging_split
    calibration, judging = (collect_split(loaded, each) for each in (CALIBRATION_SPLIT, split))
    weights_DN = draws(len(judging.labels_N), draws_)
    content: dict[str, Any] = {
        **circumstances(),
        "recipe": recipe.name,
        "split": split,
        "num_images": len(judging.labels_N),
        "num_calibration_images": len(calibration.labels_N),
        "drop": drop,
        "draws": draws_,
        "exits_mean_iou": judging.quality_K.tolist(),
        "exit_macs": judging.costs.exit_macs(),
        "plain_macs": judging.costs.plain_macs,
        "rules": compare(calibration, judging, weights_DN, drop),
    }
    show(content["rules"], drop)
    if rival is not None:
        other = collect_split(load(rival), split)
        content["rival"] = against_rival(calibration, judging, other, weights_DN)
        print(content["rival"])
    if json_file is not None:
        write_json(content, json_file)


if __name__ == "__main__":
    typer.run(main)
