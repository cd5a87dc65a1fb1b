"""How much does the baseline cut the variance of the policy gradient?

START_RUN is a run of a network that skips blocks. Batches of training data are run with actions
drawn, and for each the gradient of the policy loss in the gates' weights is taken twice, from the
same actions: with the baseline and without. The variance is the mean squared distance from the mean
gradient, over batches; the two means say whether the baseline leaves the gradient as it is.

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
from offramp.routing.reinforce import reinforce_loss, returns_to_go, skip_rewards
from offramp.routing.skip import SkipNetwork, sampled
from offramp.training.run import load_training_data
from record import circumstances, write_json


def policy_gradient(
    network: SkipNetwork, inputs: Tensor, labels: Tensor, alpha: float
) -> dict[str, Tensor]:
    """The gradient in the gates' weights, from the same actions, with and without baseline."""
    output = network(inputs, sampled)
    losses = F.cross_entropy(output.logits, labels, reduction="none").detach()
    returns = returns_to_go(skip_rewards(output.action, alpha), -losses)
    weights = list(network.gates.parameters())
    gradients = {}
    for name, baseline in (("without", False), ("with", True)):
        loss = reinforce_loss(output.probability, output.action, returns, baseline=baseline)
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
    found: dict[str, list[Tensor]] = {"with": [], "without": []}
    for _ in range(batches):
        rows = torch.randint(len(train), (batch_size,), generator=generator)
        inputs, labels = train.__getitems__(rows.tolist())
        for name, gradient in policy_gradient(network, inputs, labels, alpha).items():
            found[name].append(gradient)
    stacked = {name: torch.stack(gradients) for name, gradients in found.items()}
    variance = {name: float(g.var(0).sum()) for name, g in stacked.items()}
    means = {name: g.mean(0) for name, g in stacked.items()}
    error = sum(v / batches for v in variance.values()) ** 0.5
    apart = float((means["with"] - means["without"]).norm())
    ratio = variance["without"] / variance["with"]
    print(
        f"variance of the gradient: {variance['without']:.3g} without, {variance['with']:.3g} with"
    )
    print(f"{ratio:.1f} times less; mean gradients {apart:.3g} apart, standard error {error:.3g}")
    if json_file is not None:
        figures = {"variance": variance, "times_less": ratio, "apart": apart, "error": error}
        settings = {"start": start.name, "alpha": alpha, "batches": batches}
        write_json({**circumstances(), **settings, **figures}, json_file)


if __name__ == "__main__":
    typer.run(main)
