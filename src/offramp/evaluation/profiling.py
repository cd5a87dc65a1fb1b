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

from offramp.evaluation.timing import check_batch_sizes, engine_versions, hardware_name
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

    Example:
        >>> profile_sizes(32, num_samples=100)
        (1, 4, 16, 32)
    """
    check_batch_sizes([batch_size], num_samples=num_samples)
    return (*(size for size in _SIZES if size < batch_size), batch_size)


def profile_network(
    network: MultiExitNetwork, policy: Policy, samples: Tensor, *, batch_size: int
) -> Profile:
    """Time stages, exits and compaction in torch."""
    sizes = profile_sizes(batch_size, num_samples=len(samples))
    wait = torch.cuda.synchronize if samples.is_cuda else lambda: None
    laps = {size: time_parts(torch_parts(network, policy, samples[:size]), wait) for size in sizes}
    return make_profile("torch", laps, num_exits=network.num_exits, device=samples.device)


def time_parts(parts: Parts, wait: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Time the parts of a network in turn, round after round."""
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


def make_profile(
    backend: str,
    laps: Mapping[int, Mapping[str, float]],
    *,
    num_exits: int,
    device: torch.device,
) -> Profile:
    """Gather what was timed, with as many threads as torch has."""

    def times(kind: str) -> Times:
        names = [f"{kind}_{k}" for k in range(num_exits)]
        return tuple(tuple(ms.get(name, 0.0) for ms in laps.values()) for name in names)

    return Profile(
        backend=backend,
        versions=engine_versions([backend]),
        hardware=hardware_name(device),
        threads=torch.get_num_threads(),
        sizes=tuple(laps),
        stage_ms=times("stage"),
        exit_ms=times("exit"),
        compaction_ms=times("compaction"),
    )


@torch.no_grad()
def torch_parts(network: MultiExitNetwork, policy: Policy, batch: Tensor) -> Parts:
    """The parts of a network, each on what the parts before hand it."""
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
    return [(name, torch.no_grad()(call)) for name, call in parts]


def _ask(
    network: MultiExitNetwork, policy: Policy, k: int, features: Features, state: State
) -> tuple[Tensor, State]:
    output = network.run_exit(k, features)
    leave_B, _, state = policy.step(k, output, state)
    bool(leave_B.all())  # a runner waits here too, to know who leaves
    return output, state


def _compact(output: Tensor, carried: Sequence[Tensor]) -> object:
    """Do what a runner does after an exit, half of the samples staying."""
    rows_B = torch.arange(len(output), device=output.device)
    answers = output.clone()
    stay_B = (rows_B % 2 == 0).nonzero()[:, 0]
    answers.index_copy_(0, rows_B, output)
    return take_samples((rows_B, *carried), stay_B)
