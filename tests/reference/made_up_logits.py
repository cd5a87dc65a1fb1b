"""Logits whose answers are known, or whose exits are each better than the one before.

Found by tests in any folder: pytest puts tests/reference on the path.
"""

import torch

from offramp.calibration.collect import ExitLogits
from offramp.measure.exit_costs import ExitCosts

TWO_COSTS = ExitCosts(stage_macs=(100, 100), head_macs=(10, 10))
"""Leaving at exit 0 costs 110; at the final exit 220, or 210 where exit 0 is off."""

THREE_COSTS = ExitCosts(stage_macs=(100, 150, 200), head_macs=(20, 5, 10))


def two_exits(*rows: tuple[float, bool, bool]) -> ExitLogits:
    """Rows of: probability that exit 0 gives its class, whether it is right, and the final exit.

    Two classes; every label is 0. A NaN probability gives NaN logits.
    """
    probability = torch.tensor([row[0] for row in rows])
    odds = (probability / (1 - probability)).log()
    first = torch.stack([odds, torch.zeros_like(odds)], 1)
    is_right = torch.tensor([row[1] for row in rows])[:, None]
    first = torch.where(is_right, first, first.flip(1))
    final = torch.tensor([[9.0, 0.0] if row[2] else [0.0, 9.0] for row in rows])
    labels = torch.zeros(len(rows), dtype=torch.int64)
    return ExitLogits(logits_KNC=torch.stack([first, final]), labels_N=labels, costs=TWO_COSTS)


def three_exits(
    seed: int,
    num_samples: int,
    *,
    signal: tuple[float, ...] = (1.0, 1.6, 2.2),
    noise: float = 1.2,
    costs: ExitCosts = THREE_COSTS,
) -> ExitLogits:
    """Three exits over four classes, each better than the one before."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (num_samples,), generator=generator)
    noise_KNC = noise * torch.randn(3, num_samples, 4, generator=generator)
    strength = torch.tensor(signal)[:, None, None]
    logits = noise_KNC + torch.nn.functional.one_hot(labels, 4) * strength
    return ExitLogits(logits_KNC=logits, labels_N=labels, costs=costs)
