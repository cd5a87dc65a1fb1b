"""How much do the baselines cut the variance of the policy gradient?

START_RUN is a run of a network that skips blocks. Batches of training data are run with actions
drawn, and for each the gradient of the policy loss in the gates' weights is taken three times, from
the same actions: without a baseline, with the batch's mean return, and with what the sample itself
earns when nothing is drawn (self-critical) and the batch's mean of that difference. The variance is
the mean squared distance from the mean gradient, over batches; the means say whether a baseline
leaves the gradient as it is.

    OFFRAMP_DATA=... python benchmarks/baseline_variance.py START_RUN [--alpha 0.35] [--batches 60]
        [--json FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from offramp import load
from offramp.routing.skip import GatedOutput, SkipNetwork, at_threshold, sampled
from offramp.runs.run import load_training_data
from offramp.training.tasks.reinforce import reinforce_loss, returns_to_go, skip_rewards
from record import circumstances, write_json


def policy_gradient(
    network: SkipNetwork, inputs: Tensor, labels: Tensor, alpha: float
) -> dict[str, Tensor]:
    """The gradient in the gates' weights, from the same actions, by baseline."""
    output = network(inputs, sampled)
    with torch.no_grad():
        greedy = network(inputs, at_threshold(0.5))

    def returns(of: GatedOutput) -> Tensor:
        losses = F.cross_entropy(of.logits, labels, reduction="none").detach()
        return returns_to_go(skip_rewards(of.action, alpha), -losses)

    drawn = returns(output)
    ways = {
        "none": (drawn, False),
        "batch": (drawn, True),
        "self-critical": (drawn - returns(greedy), True),
    }
    weights = list(network.gates.parameters())
    gradients = {}
    for name, (earned, baseline) in ways.items():
        loss = reinforce_loss(output.probability, output.action, earned, baseline=baseline)
        parts = torch.autograd.grad(loss, weights, retain_graph=True)
        gradients[name] = torch.cat([part.flatten() for part in parts])
    return gradients


def main(
    start: Annotated[Path, typer.Argument(help="A run of a network that skips blocks.")],
    alpha: Annotated[float, typer.Option(help="What skipping all blocks earns.")] = 0.35,
    batches: Annotated[int, typer.Option(help="Gradients to take.")] = 60,
    batch_size: Annotated[int, typer.Option(help="Samples each.")] = 128,
    data: Annotated[str | None, typer.Option(help="Folder with the Parquet files.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures.")] = None,
) -> None:
    loaded = load(start)
    network = loaded.network
    if not isinstance(network, SkipNetwork):
        raise typer.BadParameter(f"expected a run of a network that skips blocks; got {start}")
    train, _, _ = load_training_data(loaded.require_recipe(), data or loaded.data)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network.train()
    found: dict[str, list[Tensor]] = {}
    for _ in range(batches):
        rows = torch.randint(len(train), (batch_size,), generator=generator)
        inputs, labels = train.__getitems__(rows.tolist())
        for name, gradient in policy_gradient(network, inputs, labels, alpha).items():
            found.setdefault(name, []).append(gradient)
    stacked = {name: torch.stack(gradients) for name, gradients in found.items()}
    variance = {name: float(g.var(0).sum()) for name, g in stacked.items()}
    mean = {name: g.mean(0) for name, g in stacked.items()}
    rows_by_baseline = {
        name: {
            "variance": variance[name],
            "times_less": variance["none"] / variance[name],
            "mean_apart": float((mean[name] - mean["none"]).norm()),
            "standard_error": ((variance[name] + variance["none"]) / batches) ** 0.5,
        }
        for name in stacked
    }
    for name, row in rows_by_baseline.items():
        print(
            f"{name}: variance {row['variance']:.3g}, {row['times_less']:.1f} times less; mean "
            f"{row['mean_apart']:.3g} apart from that of none, standard error "
            f"{row['standard_error']:.3g}"
        )
    if json_file is not None:
        settings = {"start": start.name, "alpha": alpha, "batches": batches}
        write_json({**circumstances(), **settings, "baselines": rows_by_baseline}, json_file)


if __name__ == "__main__":
    typer.run(main)
