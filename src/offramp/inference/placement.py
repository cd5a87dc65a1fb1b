"""Where exits could hang on a backbone, by the clock: cuts that share its time out evenly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.measure.cost import evaluation_mode
from offramp.model.cut import add_exits, cut_paths
from offramp.model.heads import head_for

_WARM_UP_ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A place where an exit could hang.

    Attributes:
        path: Of the module that it would follow.
        ms: The backbone from its start to this module's end, a batch.
        share: ``ms`` over the whole backbone's, a fraction in [0, 1].
        head_ms: The exit head that would hang here, a batch.
        chosen: Whether it is proposed.
    """

    path: str
    ms: float
    share: float
    head_ms: float
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where to put exits, and the milliseconds that say so.

    Attributes:
        at: The proposed paths in order, for ``add_exits(backbone, at=...)``.
        candidates: Every place where an exit can pay, in order.
        total_ms: The whole backbone, a batch.
        batch_size: Samples a batch.
    """

    at: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    total_ms: float
    batch_size: int

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON."""
        return asdict(self)


def place(
    backbone: nn.Module,
    *,
    num_exits: int,
    example: Tensor,
    num_classes: int,
    rounds: int = 15,
) -> Placement:
    """Propose where to put exits, from the time that each piece of a backbone takes.

    The cuts share the backbone's milliseconds out as evenly as its pieces allow. How accurate an
    exit is at its place is not looked at: that takes training.

    Args:
        backbone: A module whose children run in order; nested ``nn.Sequential`` are opened.
        num_exits: Exits to place, at least 2; the final exit at the backbone's end counts.
        example: A batch like those that will be run, shape (B, ...), on the backbone's device.
        num_classes: Number of classes C.
        rounds: How often the backbone is run; medians count.
    Returns:
        The proposed paths and the milliseconds behind them.
    Raises:
        InvalidArgumentError: If there are fewer than two exits, more than there are places where
            one can pay, or no rounds, or the backbone does not end in ``num_classes`` outputs.
        ShapeError: If the example has no sample in it.
        BackboneCutError: If the children do not run in order.
    """
    _check_at_least("num_exits", num_exits, 2)
    _check_at_least("rounds", rounds, 1)
    if example.ndim == 0 or len(example) == 0:
        raise ShapeError(
            "Expected an example with a batch axis of at least one sample. "
            f"Got shape {tuple(example.shape)}."
        )
    paths = cut_paths(backbone)
    no_heads = [nn.Identity() for _ in paths[:-1]]
    add_exits(  # refuses a backbone that is not its pieces run in order
        backbone,
        at=paths[:-1],
        num_classes=num_classes,
        example=example,
        heads=no_heads,
    )
    pieces = {path: backbone.get_submodule(path) for path in paths}
    with evaluation_mode(backbone), torch.inference_mode():
        heads = _fitting_heads(pieces, example, num_classes)
        piece_ms, head_ms = _profile(pieces, heads, example, rounds)
    return propose(piece_ms, head_ms, num_exits=num_exits, batch_size=len(example))


def propose(
    piece_ms: Mapping[str, float],
    head_ms: Mapping[str, float],
    *,
    num_exits: int,
    batch_size: int,
) -> Placement:
    """Propose where to put exits, from milliseconds that were measured.

    An exit after which less time remains than its own head takes cannot pay: it is no candidate.

    Args:
        piece_ms: Milliseconds of each piece by path, in the order they run.
        head_ms: Milliseconds of the exit head after a piece, by path, where a head fits.
        num_exits: Exits to place, at least 2; the final exit counts.
        batch_size: Samples a batch.
    Returns:
        The proposed paths and the candidates they are chosen from.
    Raises:
        InvalidArgumentError: If there are more exits than places where one can pay.
    """
    until_ms = dict(zip(piece_ms, accumulate(piece_ms.values()), strict=True))
    total_ms = sum(piece_ms.values())
    paying = [path for path in head_ms if total_ms - until_ms[path] >= head_ms[path]]
    if num_exits > len(paying) + 1:
        raise InvalidArgumentError(
            f"The 'num_exits' parameter must be an int of at most {len(paying) + 1}: this backbone "
            f"has {len(paying)} places where an exit can pay, and its end. Got {num_exits}."
        )
    cuts = choose_cuts([until_ms[path] for path in paying], total_ms=total_ms, num_exits=num_exits)
    return Placement(
        at=tuple(paying[index] for index in cuts),
        candidates=tuple(
            Candidate(
                path=path,
                ms=until_ms[path],
                share=until_ms[path] / total_ms,
                head_ms=head_ms[path],
                chosen=index in cuts,
            )
            for index, path in enumerate(paying)
        ),
        total_ms=total_ms,
        batch_size=batch_size,
    )


def choose_cuts(
    cumulative_ms: Sequence[float], *, total_ms: float, num_exits: int
) -> tuple[int, ...]:
    """Choose the cuts nearest to equal shares of the time.

    Cut k of ``num_exits - 1`` should come after k / num_exits of the whole; the sum of squared
    distances is as small as can be. Of equally good choices the earlier cuts are taken.

    Args:
        cumulative_ms: Milliseconds from the start to each candidate, growing; at least
            ``num_exits - 1`` of them.
        total_ms: Milliseconds of the whole.
        num_exits: Exits, the final one at the end counted.
    Returns:
        Which candidates, in order, each once.
    Example:
        >>> choose_cuts([1.0, 4.0, 5.0, 9.0], total_ms=12.0, num_exits=3)
        (1, 3)
    """
    num_cuts = num_exits - 1
    nothing: tuple[float, tuple[int, ...]] = (math.inf, ())
    # Entry k: the best choice of the first k cuts among the candidates seen so far.
    best = [(0.0, ()), *[nothing] * num_cuts]
    for index, ms in enumerate(cumulative_ms):
        for k in range(num_cuts, 0, -1):
            distance, cuts = best[k - 1]
            distance += (ms - total_ms * k / num_exits) ** 2
            best[k] = min(best[k], (distance, (*cuts, index)))
    return best[-1][1]


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidArgumentError(
            f"The {name!r} parameter must be an int of at least {least}. Got {value}."
        )


def _fitting_heads(
    pieces: Mapping[str, nn.Module], example: Tensor, num_classes: int
) -> dict[str, nn.Module]:
    """A head for the features after each piece but the last, where one fits."""
    heads = {}
    features = example.clone()
    for path in list(pieces)[:-1]:
        features = pieces[path](features)
        if features.is_floating_point():
            with suppress(ShapeError):
                heads[path] = head_for(features, num_classes).to(features)
    return heads


def _profile(
    pieces: Mapping[str, nn.Module],
    heads: Mapping[str, nn.Module],
    example: Tensor,
    rounds: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of each piece and head, run one after the other as the network would."""
    piece_laps: dict[str, list[float]] = {path: [] for path in pieces}
    head_laps: dict[str, list[float]] = {path: [] for path in heads}
    for _ in range(_WARM_UP_ROUNDS + rounds):
        features = example.clone()
        for path, piece in pieces.items():
            features, elapsed_ms = _timed(piece, features)
            piece_laps[path].append(elapsed_ms)
            if path in heads:
                _, elapsed_ms = _timed(heads[path], features)
                head_laps[path].append(elapsed_ms)
    return _medians(piece_laps), _medians(head_laps)


def _timed(module: nn.Module, features: Tensor) -> tuple[Tensor, float]:
    synchronise: Callable[[], None] = torch.cuda.synchronize if features.is_cuda else lambda: None
    synchronise()
    start = time.perf_counter()
    output: Tensor = module(features)
    synchronise()
    return output, 1e3 * (time.perf_counter() - start)


def _medians(laps: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {path: median(values[_WARM_UP_ROUNDS:]) for path, values in laps.items()}
