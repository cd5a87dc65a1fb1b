"""Milliseconds of the adaptive network against the plain one, side by side on real samples.

Every contender runs the same batches in every round, in turn; medians over the rounds are
reported. torch is timed in this process, or each engine in a process of its own.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.errors import InvalidArgumentError
from offramp.evaluation.stopwatch import (
    Laps,
    LocalStopwatch,
    Stopwatch,
    representative_rows,
    time_in_turn,
)
from offramp.measure.arrays import as_array
from offramp.results import AdaptiveResult
from offramp.runtime.hardware import processor_name
from offramp.tables import Brief, Lines, Printed, Table, factor, milliseconds

if TYPE_CHECKING:  # a bundle is timed without torch
    import torch
    from torch import Tensor

    from offramp.families.family import Contenders, TorchRunner

_MOST_S = 120.0
"""Seconds that the rounds of one batch size may take: fewer are run where all take longer."""


@dataclass(frozen=True, kw_only=True, repr=False)
class BatchTiming(Brief):
    """Medians for one batch size.

    Attributes:
        backend: The engine that ran.
        batch_size: Samples a batch.
        plain_ms: The plain network, a batch.
        all_exits_ms: Everything, then choosing, as most published code does: every stage and head,
            or every block, masked by its gate.
        adaptive_ms: Leaving early, or skipping blocks.
        never_exit_ms: Asking every head or gate and saving nothing: the price of asking.
        interval_ms: First and third quartile over the rounds, by contender.
        ideal_speedup: Plain MACs over mean MACs, of the samples that were timed, each with its own.
        speedup: plain_ms over adaptive_ms.
        realised: speedup over ideal_speedup.
        stage_bound: Stages and heads alone at the survivors' batch sizes, over adaptive_ms; None
            without stages, as where blocks are skipped.
        stage_ms: Each stage with its head on a full batch; steps of a bundle, for onnxruntime;
            None without stages.
        num_samples: Samples that every contender ran in each round, and that ``ideal_speedup`` is
            of: 64 at least, as far as they went in whole batches.
        rounds: How often; fewer than asked for where the network is slow.
        speedup_interval: First and third quartile over the rounds of plain over adaptive time.
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
    stage_bound: float | None
    stage_ms: tuple[float, ...] | None
    num_samples: int
    rounds: int
    speedup_interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True, repr=False)
class Timing(Printed):
    """Milliseconds of a runner and its rivals; print it for a table.

    Attributes:
        hardware: Processor or GPU.
        threads: Threads that compute.
        versions: Of Python and the engines.
        shares: Of the given samples that left by each exit; those that are timed stand for them.
        mean_macs: Mean MACs per given sample.
        stage_ms: Batch size to milliseconds of each stage, of the engine that was named last;
            empty without stages.
        results: One entry for each batch size and engine.
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

    def _title(self) -> str:
        return "milliseconds a batch, medians"

    def _parts(self) -> list[Table | Lines]:
        engines = list(dict.fromkeys(row.backend for row in self.results))
        parts: list[Table | Lines] = []
        for engine in engines:
            if len(engines) > 1:
                parts.append(Lines([("engine", engine)]))
            parts.append(Table(_COLUMNS, [_cells(r) for r in self.results if r.backend == engine]))
        return [*parts, Lines(self._conditions(engines))]

    def _records(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.results]

    def _conditions(self, engines: Sequence[str]) -> list[tuple[str, str]]:
        named = ", ".join(f"{engine} {self.versions[engine]}" for engine in engines)
        rounds = sorted({row.rounds for row in self.results})
        lines = [
            ("hardware", self.hardware),
            ("engine", f"{self.threads} threads, {named}"),
            ("gain, its quartiles", f"plain over adaptive, {' or '.join(map(str, rounds))} rounds"),
            ("ideal", "plain MACs over mean MACs of the same samples"),
        ]
        slower = [row for row in self.results if row.speedup < 1]
        return lines + [
            (
                "slower than plain",
                f"batches of {row.batch_size} in {row.backend}: running less takes "
                f"{milliseconds(row.adaptive_ms)} ms against {milliseconds(row.plain_ms)}",
            )
            for row in slower
        ]


_COLUMNS = (
    *("batch", "samples", "plain", "all exits", "adaptive", "never exit"),
    *("gain", "quartiles", "ideal"),
)


def _cells(row: BatchTiming) -> tuple[str, ...]:
    times = (row.plain_ms, row.all_exits_ms, row.adaptive_ms, row.never_exit_ms)
    first, third = row.speedup_interval
    return (
        str(row.batch_size),
        f"{row.num_samples:,}",
        *map(milliseconds, times),
        factor(row.speedup),
        f"{factor(first)}-{factor(third)}",
        factor(row.ideal_speedup),
    )


def time_runner(
    runner: TorchRunner[Any, Any],
    inputs: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 32, 256),
    rounds: int = 15,
) -> Timing:
    """Time a runner against its plain network, and against choosing afterwards, in this process.

    Before the clock starts, the runner's answers are checked against choosing afterwards. Gain and
    ideal are of the same samples: at least 64, or as many whole batches as there are, spread
    evenly over all samples from the cheapest to the dearest, each with its own plain MACs. Where
    the rounds would take longer than two minutes a batch size, fewer are run, at least two; the
    samples stay.

    Args:
        runner: The runner to time, with its network and policy.
        inputs: Real samples, shape (N, ...), on the network's device.
        batch_sizes: Samples a batch; each at most N.
        rounds: How often every contender runs all batches, at most.
    Returns:
        Medians per batch; print it for a table.
    Raises:
        InvalidArgumentError: If a batch size is below 1 or above N, or there are no rounds.
        OfframpError: If running less gives other answers than choosing afterwards.
    """
    import torch
    from torch import Tensor

    from offramp.families import check_agreement
    from offramp.families.family import TorchRunner

    if not isinstance(runner, TorchRunner):
        raise InvalidArgumentError(
            "Expected a runner to time, such as AdaptiveRunner(network, policy). "
            f"Got a {type(runner).__name__}."
        )
    if not isinstance(inputs, Tensor):
        raise InvalidArgumentError(
            f"Expected the samples in a tensor, without labels. Got a {type(inputs).__name__}."
        )
    check_batch_sizes(batch_sizes, num_samples=len(inputs))
    result = runner.run(inputs)
    check_agreement(result, runner, inputs)
    spent = Spent.of(result, runner.network.plain_macs(inputs))
    return time_engines(
        {"torch": torch_stopwatch(runner, inputs, spent.shares)},
        result,
        spent,
        num_exits=runner.network.num_exits,
        batch_sizes=batch_sizes,
        rounds=rounds,
        hardware=hardware_name(inputs.device),
        threads=torch.get_num_threads(),
    )


def time_engines(
    stopwatches: Mapping[str, Stopwatch],
    result: AdaptiveResult[Any],
    spent: Spent,
    *,
    num_exits: int,
    batch_sizes: Sequence[int],
    rounds: int,
    hardware: str,
    threads: int,
) -> Timing:
    """Time engines in turn, each with all its contenders."""
    if rounds < 2:
        raise InvalidArgumentError(
            f"The 'rounds' parameter must be an int of at least 2. Got {rounds}."
        )
    exit_index_N = as_array(result.exit_index)
    results = []
    for batch_size in batch_sizes:
        in_turn = time_in_turn(stopwatches, batch_size, rounds, most_s=_MOST_S)
        for backend, laps in in_turn.items():
            ideal_speedup = spent.ideal_speedup(batch_size * laps.num_batches)
            results.append(_summary(backend, batch_size, laps, ideal_speedup))
    shares_K = np.bincount(exit_index_N, minlength=num_exits) / len(exit_index_N)
    last_backend = list(stopwatches)[-1]
    return Timing(
        hardware=hardware,
        threads=threads,
        versions={"python": platform.python_version(), **engine_versions(stopwatches)},
        shares=tuple(shares_K.tolist()),
        mean_macs=spent.mean_macs,
        stage_ms={
            row.batch_size: row.stage_ms
            for row in results
            if row.backend == last_backend and row.stage_ms is not None
        },
        results=tuple(results),
    )


@dataclass(frozen=True)
class Spent:
    """Costs of samples, each beside what the plain network takes for it.

    Attributes:
        macs: That ran for each sample.
        plain_macs: Of the plain network.
    """

    macs: tuple[int, ...]
    plain_macs: tuple[int, ...]

    @classmethod
    def of(cls, result: AdaptiveResult[Any], plain_macs_N: Any) -> Spent:
        """Put what a runner said beside what the plain network takes."""
        return cls(*(tuple(map(int, macs_N)) for macs_N in (result.macs, plain_macs_N)))

    @property
    def shares(self) -> list[float]:
        """MACs of each sample over its own plain ones."""
        return [macs / plain for macs, plain in zip(self.macs, self.plain_macs, strict=True)]

    @property
    def mean_macs(self) -> float:
        """Mean MACs a sample."""
        return sum(self.macs) / len(self.macs)

    def ideal_speedup(self, count: int) -> float:
        """Plain MACs over MACs, of the samples that stand for all when so many are timed."""
        rows = representative_rows(self.shares, count)
        return sum(self.plain_macs[row] for row in rows) / sum(self.macs[row] for row in rows)


def torch_stopwatch(
    runner: TorchRunner[Any, Any], inputs: Tensor, shares: Sequence[float] | None
) -> LocalStopwatch:
    """A stopwatch for what torch runs in this process."""
    import torch

    from offramp.evaluation.contenders import torch_contenders

    def contenders(size: int, count: int) -> Contenders:
        rows = representative_rows(shares, size * count)
        return torch_contenders(runner, torch.split(inputs[rows], size))

    return LocalStopwatch(
        contenders,
        num_samples=len(inputs),
        synchronise=torch.cuda.synchronize if inputs.is_cuda else lambda: None,
    )


def check_batch_sizes(batch_sizes: Sequence[int], *, num_samples: int) -> None:
    """Refuse batch sizes that cannot be timed."""
    if not num_samples:
        raise InvalidArgumentError("Expected at least one sample to time. Got none.")
    if not isinstance(batch_sizes, Sequence):
        raise InvalidArgumentError(
            f"The 'batch_sizes' parameter must hold ints, such as (1, 32). Got {batch_sizes!r}."
        )
    for batch_size in batch_sizes:
        if not isinstance(batch_size, int) or not 1 <= batch_size <= num_samples:
            raise InvalidArgumentError(
                f"A batch size must be an int in [1, {num_samples}], the samples there are. "
                f"Got {batch_size}."
            )


def _summary(backend: str, batch_size: int, laps: Laps, ideal_speedup: float) -> BatchTiming:
    batch_ms = laps.batch_ms
    middle = {name: median(values) for name, values in batch_ms.items()}
    gains = [
        plain / adaptive
        for plain, adaptive in zip(batch_ms["plain"], batch_ms["adaptive"], strict=True)
    ]
    speedup = middle["plain"] / middle["adaptive"]
    stage_ms = tuple(middle[name] for name in middle if name.startswith("stage_"))
    return BatchTiming(
        backend=backend,
        batch_size=batch_size,
        plain_ms=middle["plain"],
        all_exits_ms=middle["all_exits"],
        adaptive_ms=middle["adaptive"],
        never_exit_ms=middle["never_exit"],
        interval_ms={
            name: _quartiles(batch_ms[name])
            for name in ("plain", "all_exits", "adaptive", "never_exit")
        },
        ideal_speedup=ideal_speedup,
        speedup=speedup,
        realised=speedup / ideal_speedup,
        stage_bound=middle["stages"] / middle["adaptive"] if stage_ms else None,
        stage_ms=stage_ms or None,
        num_samples=batch_size * laps.num_batches,
        rounds=len(gains),
        speedup_interval=_quartiles(gains),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def engine_versions(engines: Iterable[str]) -> dict[str, str]:
    """Look up the versions of engines."""
    return {name: str(import_module(name).__version__) for name in engines}


def hardware_name(device: torch.device) -> str:
    """Name the processor or GPU that computes."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return processor_name()
