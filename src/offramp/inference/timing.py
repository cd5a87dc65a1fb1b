"""Milliseconds of the adaptive network against the plain one, side by side on real samples.

Every contender runs the same batches in every round, in turn, so that what else the machine
does falls on all of them; medians over the rounds are reported.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from offramp.errors import InvalidArgumentError
from offramp.inference.agreement import all_exits_loop, check_early_answers
from offramp.inference.runner import AdaptiveRunner
from offramp.model.multi_exit import Features
from offramp.policy.policies import Decision, Policy, Setting, State


@dataclass(frozen=True, kw_only=True)
class BatchTiming:
    """Medians for one batch size.

    Attributes:
        backend: The engine that ran.
        batch_size: Samples a batch.
        plain_ms: The plain network, a batch.
        all_exits_ms: Every stage and head, then choosing: the tutorial's way.
        adaptive_ms: Leaving early.
        never_exit_ms: Every head computed and nobody let go: the price of asking.
        interval_ms: First and third quartile over the rounds, by contender.
        ideal_speedup: Plain MACs over mean MACs.
        speedup: plain_ms over adaptive_ms.
        realised: speedup over ideal_speedup.
        stage_bound: Stages and heads alone at the survivors' batch sizes, over adaptive_ms.
    """

    backend: str
    batch_size: int
    plain_ms: float
    all_exits_ms: float
    adaptive_ms: float
    never_exit_ms: float
    interval_ms: dict[str, tuple[float, float]]
    ideal_speedup: float
    speedup: float
    realised: float
    stage_bound: float


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What ``offramp time --json`` prints.

    Attributes:
        hardware: Processor or GPU.
        threads: Threads torch computes with.
        versions: Of Python and torch.
        shares: Of the timed samples that left by each exit.
        mean_macs: Mean MACs per timed sample.
        stage_ms: Batch size to milliseconds of each stage with its head on a full batch.
        results: One entry a batch size.
    """

    hardware: str
    threads: int
    versions: dict[str, str]
    shares: tuple[float, ...]
    mean_macs: float
    stage_ms: dict[int, tuple[float, ...]] = field(default_factory=dict)
    results: tuple[BatchTiming, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON."""
        return asdict(self)


@torch.inference_mode()
def time_runner(
    runner: AdaptiveRunner,
    inputs: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 32, 256),
    rounds: int = 15,
    max_batches: int = 64,
) -> Timing:
    """Time a runner against its plain network and the all-exits loop.

    Before the clock starts, the runner's answers are checked against the all-exits loop.

    Args:
        runner: The runner to time, with its network and policy.
        inputs: Real samples, shape (N, ...), on the network's device.
        batch_sizes: Samples a batch; each at most N.
        rounds: How often every contender runs all batches.
        max_batches: Batches in a round, at most.
    Returns:
        Medians per batch.
    Raises:
        InvalidArgumentError: If a batch size is below 1 or above N, or there are no rounds.
        OfframpError: If leaving early gives other answers than choosing afterwards.
    """
    for batch_size in batch_sizes:
        if not 1 <= batch_size <= len(inputs):
            raise InvalidArgumentError(
                f"A batch size must be an int in [1, {len(inputs)}], the samples there are. "
                f"Got {batch_size}."
            )
    if rounds < 2:
        raise InvalidArgumentError(
            f"The 'rounds' parameter must be an int of at least 2. Got {rounds}."
        )
    result = runner.run(inputs)
    check_early_answers(result, runner, inputs)
    mean_macs = float(result.macs.double().mean())
    num_exits = runner.network.num_exits
    stage_ms, timings = {}, []
    for batch_size in batch_sizes:
        batches = torch.split(inputs, batch_size)[:max_batches]
        full = [batch for batch in batches if len(batch) == batch_size]
        timing, stages = _time_batch_size(runner, full, rounds)
        timings.append(timing)
        stage_ms[batch_size] = stages
    return Timing(
        hardware=hardware_name(inputs.device),
        threads=torch.get_num_threads(),
        versions={"python": platform.python_version(), "torch": torch.__version__},
        shares=tuple(
            (torch.bincount(result.exit_index, minlength=num_exits).double() / len(inputs)).tolist()
        ),
        mean_macs=mean_macs,
        stage_ms=stage_ms,
        results=tuple(timings),
    )


def hardware_name(device: torch.device) -> str:
    """Name the processor or GPU that computes.

    Args:
        device: A torch device.
    Returns:
        For the CPU its model and number of cores; for a GPU its name.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_model()}, {os.cpu_count()} cores"


def _processor_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _time_batch_size(
    runner: AdaptiveRunner, batches: Sequence[Tensor], rounds: int
) -> tuple[BatchTiming, tuple[float, ...]]:
    network, policy = runner.network, runner.policy
    plain = network.plain().eval()
    never = AdaptiveRunner(network, _AskButStay(policy))
    survivors = [_features_of_survivors(runner, batch) for batch in batches]
    everyone = [_features_of_survivors(never, batch) for batch in batches]
    contenders: dict[str, Callable[[], object]] = {
        "plain": lambda: [plain(batch) for batch in batches],
        "all_exits": lambda: [all_exits_loop(network, policy, batch) for batch in batches],
        "adaptive": lambda: [runner.run(batch) for batch in batches],
        "never_exit": lambda: [never.run(batch) for batch in batches],
        "stages": lambda: [_run_part(runner, k, f) for given in survivors for k, f in given],
    }
    for k in range(network.num_exits):
        contenders[f"stage_{k}"] = partial(_run_stage_of_all, never, k, everyone)
    batch_ms: dict[str, list[float]] = {name: [] for name in contenders}
    for round_index in range(rounds + 2):
        for name, run_all in contenders.items():
            elapsed_ms = _elapsed_ms(run_all, batches[0].device) / len(batches)
            if round_index >= 2:  # the first rounds warm up
                batch_ms[name].append(elapsed_ms)
    middle = {name: median(values) for name, values in batch_ms.items()}
    macs = torch.cat([runner.run(batch).macs for batch in batches]).double().mean()
    ideal_speedup = network.costs(batches[0]).plain_macs / float(macs)
    speedup = middle["plain"] / middle["adaptive"]
    timing = BatchTiming(
        backend="torch",
        batch_size=len(batches[0]),
        plain_ms=middle["plain"],
        all_exits_ms=middle["all_exits"],
        adaptive_ms=middle["adaptive"],
        never_exit_ms=middle["never_exit"],
        interval_ms={
            name: (quantiles(batch_ms[name], n=4)[0], quantiles(batch_ms[name], n=4)[2])
            for name in ("plain", "all_exits", "adaptive", "never_exit")
        },
        ideal_speedup=ideal_speedup,
        speedup=speedup,
        realised=speedup / ideal_speedup,
        stage_bound=middle["stages"] / middle["adaptive"],
    )
    return timing, tuple(middle[f"stage_{k}"] for k in range(network.num_exits))


class _AskButStay(Policy):
    """Asks another policy at every exit and lets nobody leave before the final one."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.num_exits = policy.num_exits

    def decide(self, exit_index: int, output: Tensor, state: State, setting: Setting) -> Decision:
        leave_B, confidence_B, state = self.policy.step(exit_index, output, state)
        if exit_index < self.num_exits - 1:
            leave_B = torch.zeros_like(leave_B)
        return leave_B, confidence_B, state


def _features_of_survivors(runner: AdaptiveRunner, batch: Tensor) -> list[tuple[int, Features]]:
    """What each stage that runs is given, when the batch runs early."""
    last_exit_B = runner.run(batch).exit_index
    features: Features = (batch,)
    given = []
    for k in range(int(last_exit_B.max()) + 1):
        given.append((k, features))
        features = runner.network.run_stage(k, features)
        stay_B = (last_exit_B > k).nonzero()[:, 0]
        features = tuple(tensor.index_select(0, stay_B) for tensor in features)
        last_exit_B = last_exit_B[stay_B]
    return given


def _run_stage_of_all(
    runner: AdaptiveRunner, k: int, batches: Sequence[list[tuple[int, Features]]]
) -> list[Features]:
    return [_run_part(runner, *given[k]) for given in batches]


def _run_part(runner: AdaptiveRunner, k: int, features: Features) -> Features:
    """A stage with its head, unless that is off."""
    features = runner.network.run_stage(k, features)
    if not runner.policy.is_off(k):
        runner.network.run_exit(k, features)
    return features


def _elapsed_ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)
