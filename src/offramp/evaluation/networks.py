"""Networks and their runners in torch, as ``evaluate`` takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from offramp.calibration.collect import collect
from offramp.calibration.logits import ExitLogits
from offramp.data.batches import batches_of, read_batch
from offramp.errors import InvalidArgumentError
from offramp.families import make_runner as make_runner
from offramp.families.family import TorchRunner


def is_network(runner: Any) -> bool:
    """Tell a network from a runner."""
    return isinstance(runner, nn.Module)


def in_tensors(runner: Any, loader: Any) -> Iterator[tuple[Any, Any]]:
    """Batches as a runner in torch takes them."""
    network = runner.network if isinstance(runner, TorchRunner) else None
    device = None if network is None else next((p.device for p in network.parameters()), None)
    for batch in batches_of(loader):
        yield read_batch(batch, network, device=device)


def collect_from_runner(runner: Any, batches: Iterable[Any]) -> ExitLogits:
    """Collect the logits of every exit from the network of a runner."""
    if not isinstance(runner, TorchRunner):
        raise InvalidArgumentError(
            "Expected every exit's logits beside a runner of your own: evaluate(runner, data, "
            "logits)."
        )
    return collect(runner.network, batches)
