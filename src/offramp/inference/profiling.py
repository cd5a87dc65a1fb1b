"""Timing a network's parts one after the other, as the network runs them.

Timed alone, over and over, a part would find its weights in the cache, which in use it does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from offramp.errors import InvalidArgumentError
from offramp.inference.timing import hardware_name
from offramp.measure.profile import Profile, Times
from offramp.model.multi_exit import Features, MultiExitNetwork, take_samples
from offramp.policy.policies import Policy, State

Parts = Sequence[tuple[str, Callable[[], object]]]
"""Named calls in the order in which they run."""

_SIZES = (1, 4, 16, 64, 256, 1024)
_SECONDS = 2.0
"""Timing one batch size takes about this long."""
_ROUNDS = (5, 200)
_WARM_UP_ROUNDS = 2


def profile_sizes(batch_size: int, *, num_samples: int) -> tuple[int, ...]:
    """Batch sizes to time, for batches that shrink on their way.

    Args:
        batch_size: Samples that come in.
        num_samples: Samples that there are to time with.
    Returns:
        Sizes from 1 to ``batch_size``.
    Raises:
        InvalidArgumentError: If the batch size is not in [1, num_samples].
    Example:
        >>> profile_sizes(32, num_samples=100)
        (1, 4, 16, 32)
    """
    if not 1 <= batch_size <= num_samples:
        raise InvalidArgumentError(
            f"A batch size must be an int in [1, {num_samples}], the samples there are. "
            f"Got {batch_size}."
        )
    return (*(size for size in _SIZES if size < batch_size), batch_size)


def profile_network(
    network: MultiExitNetwork, policy: Policy, samples: Tensor, *, batch_size: int
) -> Profile:
    """Time stages, exits and compaction in torch.

    Args:
        network: The network, in evaluation mode.
        policy: Decides at the exits; only its kind matters here, not its numbers.
        samples: Real inputs, shape (N, ...), on the network's device, N at least ``batch_size``.
        batch_size: Samples that come in; smaller sizes are timed too.
    Returns:
        Medians.
    Raises:
        InvalidArgumentError: If the batch size is not in [1, N].
    """
    sizes = profile_sizes(batch_size, num_samples=len(samples))
    wait = torch.cuda.synchronize if samples.is_cuda else lambda: None
    laps = [time_parts(torch_parts(network, policy, samples[:size]), wait) for size in sizes]
    return Profile(
        backend="torch",
        versions={"torch": str(torch.__version__)},
        hardware=hardware_name(samples.device),
        threads=torch.get_num_threads(),
        sizes=sizes,
        stage_ms=times_of("stage", laps, num_exits=network.num_exits),
        exit_ms=times_of("exit", laps, num_exits=network.num_exits),
        compaction_ms=times_of("compaction", laps, num_exits=network.num_exits),
    )


def time_parts(parts: Parts, wait: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Time the parts of a network in turn, round after round.

    Args:
        parts: What to run, in order.
        wait: Called before and after each part, for devices that work asynchronously.
    Returns:
        Median milliseconds of each part.
    """
    laps: dict[str, list[float]] = {name: [] for name, _ in parts}
    rounds, begun = 0, time.perf_counter()
    least, most = _ROUNDS
    while rounds < least or (rounds < most and time.perf_counter() - begun < _SECONDS):
        for name, call in parts:
            wait()
            start = time.perf_counter()
            call()
            wait()
            laps[name].append(1e3 * (time.perf_counter() - start))
        rounds += 1
    return {name: median(values[_WARM_UP_ROUNDS:]) for name, values in laps.items()}


def times_of(kind: str, laps: Sequence[Mapping[str, float]], *, num_exits: int) -> Times:
    """Gather one kind of part.

    Args:
        kind: Parts are named ``kind_0``, ``kind_1``, ...; one that is not there takes no time.
        laps: Milliseconds by part, for each batch size.
        num_exits: Exits of the network.
    Returns:
        Milliseconds of each part, by batch size.
    """
    return tuple(tuple(ms.get(f"{kind}_{k}", 0.0) for ms in laps) for k in range(num_exits))


@torch.inference_mode()
def torch_parts(network: MultiExitNetwork, policy: Policy, batch: Tensor) -> Parts:
    """The parts of a network, each on what the parts before hand it.

    Args:
        network: The network, in evaluation mode.
        policy: Decides at the exits.
        batch: Inputs, shape (B, ...).
    Returns:
        Calls of stages, of heads with their decision, and of compaction to half of the samples;
        a batch of one has nothing to compact.
    """
    parts: list[tuple[str, Callable[[], object]]] = []
    features: Features = (batch,)
    state: State = ()
    for k in range(network.num_exits):
        parts.append((f"stage_{k}", partial(network.run_stage, k, features)))
        features = network.run_stage(k, features)
        parts.append((f"exit_{k}", partial(_ask, network, policy, k, features, state)))
        output, state = _ask(network, policy, k, features, state)
        if k < network.num_exits - 1 and len(batch) > 1:
            parts.append((f"compaction_{k}", partial(_compact, output, (*features, *state))))
    return [(name, torch.inference_mode()(call)) for name, call in parts]


def _ask(
    network: MultiExitNetwork, policy: Policy, k: int, features: Features, state: State
) -> tuple[Tensor, State]:
    output = network.run_exit(k, features)
    leave_B, _, state = policy.step(k, output, state)
    bool(leave_B.all())  # a runner waits here too, to know who leaves
    return output, state


def _compact(output: Tensor, carried: Sequence[Tensor]) -> object:
    """What a runner does after an exit, half of the samples staying."""
    rows_B = torch.arange(len(output), device=output.device)
    answers = output.clone()
    stay_B = (rows_B % 2 == 0).nonzero()[:, 0]
    answers.index_copy_(0, rows_B, output)
    return take_samples((rows_B, *carried), stay_B)
