"""Guarantees tested by repeating them: how often is a promise broken, and what does it cost?

The pool of cached logits of test images is the population, so that the true risk of any policy is
known. Calibration sets are drawn from it with replacement, again and again; on each, a policy is
chosen with a guarantee, and it is a violation if its risk on the pool is above the target. The
candidates come from train images of the run: no row of the pool shapes them. A cell is a network, a
risk, a size, a target and a level. Bar: in no cell are violations significantly more frequent than
1 - level (binomial test, Holm over all cells, 1 %). A draw that allows no promise counts as saving
nothing. In some cells a set number is drawn from each class, as recipes cut calibration data from
train. Conformal risk control is judged by its mean risk over the draws.

At 5,000 samples, 1 % and 95 %, the mean saving is set against Learn then Test with one threshold
for all exits and against the choice without a guarantee, on the same draws. Bars: at least that of
the one, at least 60 % of that of the other.

At 2,115 samples, 1 % and 95 %, four draws are each given ten seeds: does luck decide what is saved?
Bars, for emnist-convnet with candidates from train images: a standard deviation of at most 4 points
within a draw, a mean saving of at least 72 %. The same draws are disturbed by 1e-6, as another
processor would: the saving may move by half a point.

    python benchmarks/guarantee.py [--draws 1000] [--network NAME] [--json FILE]

With --json, what is finished is kept: the same command goes on where it was stopped. Some minutes
on one core for a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import binom

from offramp import ExitLogits, calibrate
from offramp.calibration.guarantee import calibrate_with_guarantee
from offramp.calibration.risk import RISKS, cautious_losses
from offramp.calibration.search import evaluate_thresholds, exits_left_by
from offramp.calibration.sequence import choose_test, in_random_order, passing_values
from offramp.calibration.targets import RiskLimit
from offramp.calibration.thresholds import confidences
from offramp.errors import InfeasibleTargetError
from offramp.policy.policies import ThresholdedPolicy, ThresholdPolicy
from pools import NAMES, read_front, read_pool, rivals
from record import circumstances, write_json

SIZES = (500, 2000, 5000)
TARGETS = (0.005, 0.01, 0.02)
GUARANTEES: tuple[float | str, ...] = (0.9, 0.95, "mean")
RISK_NAMES = ("accuracy_gap", "disagreement")
BLOCKS = (
    *(("accuracy_gap", size, False) for size in SIZES),
    ("accuracy_gap", 2000, True),
    *(("disagreement", size, False) for size in SIZES),
)
"""Risk, size, and whether a set number is drawn from each class."""

LUCK: dict[str, Any] = {"size": 2115, "max_risk": 0.01, "guarantee": 0.95}
LUCK_DRAWS, LUCK_SEEDS = 4, 10
USE_DRAWS = 200
NOISE = 1e-6
BLOCK_KEYS = ("network", "risk", "size", "by_class")
USE = {"size": 5000, "max_risk": 0.01, "guarantee": 0.95}
FAMILY_LEVEL = 0.01


@dataclass(frozen=True)
class Pool:
    """A population: what is drawn from, and what any policy does on all of it.

    Attributes:
        name: Of the run.
        logits: Of test images, which are the population.
        front: Of train images, which find the candidates.
    """

    name: str
    logits: ExitLogits
    front: ExitLogits

    @cached_property
    def confidence_KN(self) -> np.ndarray:
        """Of every exit about every sample, by entropy."""
        return confidences(self.logits, self.logits.policies("entropy")[0])

    @cached_property
    def losses(self) -> dict[str, np.ndarray]:
        """Of every exit and sample, by risk."""
        return {risk: RISKS[risk].losses(self.logits) for risk in RISK_NAMES}

    def draw(
        self, size: int, seed: int, *, by_class: bool = False
    ) -> tuple[np.ndarray, tuple[float, ...] | None]:
        """Rows of a calibration set, drawn with replacement, and its prior.

        By class, as recipes cut it from train: so many of each, the prior their shares.
        """
        generator = np.random.default_rng([size, seed])
        if not by_class:
            return generator.integers(0, len(self.logits.labels_N), size), None
        counts = self.logits.class_counts
        of_class = np.split(np.argsort(self.logits.labels_N, kind="stable"), counts.cumsum()[:-1])
        shares = counts / counts.sum()
        rows = [
            generator.choice(rows, max(2, round(size * share)))
            for rows, share in zip(of_class, shares, strict=True)
        ]
        return np.concatenate(rows), tuple(shares.tolist())

    @cached_property
    def candidates(self) -> dict[str, Candidates]:
        """By risk."""
        policies = self.front.policies("entropy")  # one: the limit itself chooses none
        return {
            risk: Candidates(self, risk, self.front.safest_first(policies, RiskLimit(risk, 0.0)))
            for risk in RISK_NAMES
        }

    def outcome(self, policy: ThresholdedPolicy, risk: str) -> tuple[float, float]:
        """True risk, and share of the plain network's MACs that is saved."""
        loss, mean_macs = evaluate_thresholds(
            self.confidence_KN, self.losses[risk], self.logits.costs, policy.thresholds
        )
        return loss, 1 - mean_macs / self.logits.costs.plain_macs


class Candidates:
    """What each candidate loses and saves on the whole pool: draws then only pick rows."""

    def __init__(self, pool: Pool, risk: str, policies: list[ThresholdedPolicy]) -> None:
        self.found = _losses(pool.front, policies, risk)
        self.tested = _losses(pool.logits, policies, risk)
        self.outcomes = [pool.outcome(policy, risk) for policy in policies]


def _losses(logits: ExitLogits, policies: list[ThresholdedPolicy], risk: str) -> np.ndarray:
    """Loss of every sample under every policy, shape (policies, N)."""
    losses_KN = cautious_losses(risk, logits)
    confidence_KN = confidences(logits, policies[0])
    exits = [exits_left_by(confidence_KN, policy.thresholds) for policy in policies]
    return np.stack([losses_KN[exit_N, np.arange(len(exit_N))] for exit_N in exits])


def one_draw(
    pool: Pool,
    rows_N: np.ndarray,
    prior: tuple[float, ...] | None,
    risk: str,
    asked: list[tuple[float, float | str]],
    *,
    seed: int = 0,
) -> Iterator[tuple[float, float] | None]:
    """True risk and share of MACs saved for each target and level; None where none is promised."""
    drawn = replace(pool.logits.take(rows_N), prior=prior)
    order, weights_N = in_random_order(drawn, seed), drawn.weights_N
    candidates = pool.candidates[risk]
    tested = (candidates.tested[:, rows_N] * weights_N)[:, order]
    for max_risk, guarantee in asked:
        test = choose_test(risk, drawn, guarantee=guarantee)
        losses = zip(candidates.found, tested, strict=True)
        try:
            passed = passing_values(test, losses, max_risk, num_samples=len(rows_N))
        except InfeasibleTargetError:
            yield None
        else:
            yield candidates.outcomes[len(passed) - 1]


def check_short_cut(pool: Pool, risk: str, size: int, *, by_class: bool) -> None:
    """The draws above must choose as the library does."""
    rows_N, prior = pool.draw(size, 0, by_class=by_class)
    drawn = replace(pool.logits.take(rows_N), prior=prior)
    (short,) = one_draw(pool, rows_N, prior, risk, [(TARGETS[-1], 0.9)])
    found = calibrate_with_guarantee(
        drawn, max_risk=TARGETS[-1], risk=risk, guarantee=0.9, finding=pool.front
    )
    assert short == pool.outcome(found.policy, risk), (short, found)


def cells_of(
    pool: Pool, risk: str, size: int, draws: int, *, by_class: bool = False
) -> Iterator[dict[str, Any]]:
    """Every target and level of a network, risk and size, on the same draws."""
    guarantees = [level for level in GUARANTEES if not (by_class and level == "mean")]
    asked = [(max_risk, guarantee) for max_risk in TARGETS for guarantee in guarantees]
    outcomes: dict[tuple[float, float | str], list[tuple[float, float] | None]] = {
        key: [] for key in asked
    }
    check_short_cut(pool, risk, size, by_class=by_class)
    for seed in track(range(draws), description=f"{pool.name} {risk} {size}"):
        rows_N, prior = pool.draw(size, seed, by_class=by_class)
        reached = one_draw(pool, rows_N, prior, risk, asked)
        for key, outcome in zip(asked, reached, strict=True):
            outcomes[key].append(outcome)
    for (max_risk, guarantee), results in outcomes.items():
        feasible = [result for result in results if result is not None]
        risks = np.array([result[0] for result in feasible])
        yield {
            "network": pool.name,
            "risk": risk,
            "size": size,
            "by_class": by_class,
            "max_risk": max_risk,
            "guarantee": guarantee,
            "draws": draws,
            "infeasible": draws - len(feasible),
            "violations": int((risks > max_risk + 1e-12).sum()),
            "mean_risk": float(risks.sum() / draws),
            "risk_error": float(np.append(risks, np.zeros(draws - len(risks))).std() / draws**0.5),
            "mean_saved": float(sum(result[1] for result in feasible) / draws),
        }


def judge(cells: list[dict[str, Any]]) -> None:
    """Mark the cells: Holm's procedure over those with a level, the mean risk for the others."""
    levelled = [cell for cell in cells if cell["guarantee"] != "mean"]
    for cell in levelled:
        delta = 1 - cell["guarantee"]
        cell["p_value"] = float(binom.sf(cell["violations"] - 1, cell["draws"], delta))
    holds = False
    for rank, cell in enumerate(sorted(levelled, key=lambda cell: cell["p_value"])):
        holds = holds or cell["p_value"] > FAMILY_LEVEL / (len(levelled) - rank)
        cell["holds"] = holds
    for cell in cells:
        if cell["guarantee"] == "mean":
            cell["holds"] = cell["mean_risk"] <= cell["max_risk"] + 2 * cell["risk_error"]


def compare_use(pool: Pool, draws: int) -> dict[str, Any]:
    """Mean share of MACs saved by each way of choosing, on the same draws."""
    shares: dict[str, list[float]] = {"pareto": [], "single": [], "naive": []}
    broken = dict.fromkeys(shares, 0)
    size, max_risk, guarantee = int(USE["size"]), USE["max_risk"], USE["guarantee"]
    for seed in track(range(draws), description=f"{pool.name} use"):
        rows_N, _ = pool.draw(size, seed)
        drawn = pool.logits.take(rows_N)
        (pareto,) = one_draw(pool, rows_N, None, "accuracy_gap", [(max_risk, guarantee)])
        naive = calibrate(drawn, max_drop=max_risk).policy
        gap_KN = RISKS["accuracy_gap"].losses(drawn)
        single = rivals.learn_then_test(confidences(drawn, naive), gap_KN, max_risk, 1 - guarantee)
        outcomes = {
            "pareto": pareto,
            "single": single and pool.outcome(ThresholdPolicy(single), "accuracy_gap"),
            "naive": pool.outcome(naive, "accuracy_gap"),
        }
        for way, outcome in outcomes.items():
            true_risk, saved = outcome or (0.0, 0.0)
            shares[way].append(saved)
            broken[way] += true_risk > max_risk + 1e-12
    means = {way: float(np.mean(values)) for way, values in shares.items()}
    return {
        "network": pool.name,
        **USE,
        "draws": draws,
        "mean_saved": means,
        "violations": broken,
        "of_naive": means["pareto"] / means["naive"],
        "bars_met": means["pareto"] >= max(means["single"], 0.6 * means["naive"]),
    }


def disturbed(logits: ExitLogits, seed: int) -> ExitLogits:
    """As another processor would give them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(logits.logits_KNC.shape, generator=generator)
    return replace(logits, logits_KNC=logits.logits_KNC + NOISE * noise)


def measure_luck(pool: Pool) -> Iterator[dict[str, Any]]:
    """What is saved by draw and seed, and how far that moves when all logits are disturbed."""
    twin = Pool(pool.name, disturbed(pool.logits, 0), disturbed(pool.front, 1))
    for by_class in (False, True):
        for found_on in ("train", "the draw itself"):
            saved = np.zeros((2, LUCK_DRAWS, LUCK_SEEDS))
            for k, population in enumerate((pool, twin)):
                for draw, seed in np.ndindex(LUCK_DRAWS, LUCK_SEEDS):
                    rows_N, prior = pool.draw(int(LUCK["size"]), draw, by_class=by_class)
                    choose = share_saved if found_on == "train" else share_saved_when_parted
                    saved[k, draw, seed] = choose(population, rows_N, prior, seed)
            yield {
                "network": pool.name,
                **LUCK,
                "by_class": by_class,
                "found_on": found_on,
                "saved": saved[0].round(6).tolist(),
                "mean_saved": float(saved[0].mean()),
                "deviation_within_draws": float(saved[0].std(axis=1, ddof=1).max()),
                "moved_by_noise": float(abs(saved[1] - saved[0]).max()),
            }


def share_saved(
    pool: Pool, rows_N: np.ndarray, prior: tuple[float, ...] | None, seed: int
) -> float:
    asked = [(LUCK["max_risk"], LUCK["guarantee"])]
    (outcome,) = one_draw(pool, rows_N, prior, "accuracy_gap", asked, seed=seed)
    return 0.0 if outcome is None else outcome[1]


def share_saved_when_parted(
    pool: Pool, rows_N: np.ndarray, prior: tuple[float, ...] | None, seed: int
) -> float:
    """Where no train images are at hand."""
    found = calibrate_with_guarantee(
        replace(pool.logits.take(rows_N), prior=prior),
        max_risk=LUCK["max_risk"],
        guarantee=LUCK["guarantee"],
        seed=seed,
    )
    return pool.outcome(found.policy, "accuracy_gap")[1]


def print_results(content: dict[str, Any]) -> None:
    cells, draws = content["cells"], max((cell["draws"] for cell in content["cells"]), default=0)
    table = Table(title=f"violations in {draws} draws (infeasible ones), or mean risk; saved")
    columns = list(dict.fromkeys((cell["max_risk"], cell["guarantee"]) for cell in cells))
    for name in ("", *(f"{100 * target:g} %, {level}" for target, level in columns)):
        table.add_column(name)
    rows: dict[str, dict[Any, str]] = {}
    for cell in cells:
        shown = str(cell["violations"]) + f" ({cell['infeasible']})" * (cell["infeasible"] > 0)
        if cell["guarantee"] == "mean":
            shown = f"{100 * cell['mean_risk']:.2f} %"
        shown += f"; {100 * cell['mean_saved']:.0f} %"
        how = " by class" * cell["by_class"]
        row = f"{cell['network']} {cell['risk']} {cell['size']:,}{how}"
        key = cell["max_risk"], cell["guarantee"]
        rows.setdefault(row, {})[key] = shown + " BROKEN" * (not cell["holds"])
    for row, by_column in rows.items():
        table.add_row(row, *(by_column.get(column, "") for column in columns))
    Console(width=200).print(table)
    for use in content["use"]:
        ways = ", ".join(
            f"{way} {100 * share:.1f} % ({use['violations'][way]} broken)"
            for way, share in use["mean_saved"].items()
        )
        print(
            f"{use['network']}, 5,000 samples, 1 %, 0.95: saved {ways}; "
            f"{100 * use['of_naive']:.0f} % of naive: {'met' if use['bars_met'] else 'MISSED'}"
        )
    for luck in content["luck"]:
        print(
            f"{luck['network']}, {luck['size']:,} samples{' by class' * luck['by_class']}, 1 %, "
            f"0.95, candidates from {luck['found_on']}: saved {100 * luck['mean_saved']:.1f} %, "
            f"deviation by seed at most {100 * luck['deviation_within_draws']:.2f} points, moved "
            f"by noise at most {100 * luck['moved_by_noise']:.2f} points"
        )


def main(
    draws: Annotated[int, typer.Option(min=2, help="Calibration sets of each size.")] = 1000,
    network: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures.")] = None,
) -> None:
    torch.set_num_threads(1)
    content: dict[str, Any] = {"cells": [], "use": [], "luck": []}
    if json_file is not None and json_file.exists():
        content = json.loads(json_file.read_text(encoding="utf-8"))
    done = {tuple(cell[key] for key in BLOCK_KEYS) for cell in content["cells"]}
    done |= {(part["network"], name) for name in ("use", "luck") for part in content[name]}

    def keep() -> None:
        judge(content["cells"])
        if json_file is not None:
            write_json({**circumstances(), **content}, json_file)

    for name in NAMES if network is None else (network,):
        pool = Pool(name, read_pool(name), read_front(name))
        if (name, "luck") not in done:
            content["luck"] += measure_luck(pool)
            keep()
        if (name, "use") not in done:
            content["use"].append(compare_use(pool, min(draws, USE_DRAWS)))
            keep()
        for risk, size, by_class in BLOCKS:
            if (name, risk, size, by_class) not in done:
                content["cells"] += cells_of(pool, risk, size, draws, by_class=by_class)
                keep()
    keep()
    print_results(content)


if __name__ == "__main__":
    typer.run(main)
