"""Placing exits on a backbone by the clock: cuts that share its time out evenly."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.measure.cost import evaluation_mode
from offramp.model.cut import cut_paths, cut_stages
from offramp.model.head_choice import choose_head
from offramp.model.multi_exit import Features, as_features
from offramp.model.spacing import choose_cuts
from offramp.tables import Lines, Printed, Table, milliseconds, percent

_WARM_UP_ROUNDS = 2

THE_END = "the end"
"""Name of the last piece, which no exit follows but the final one."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A place where an exit could hang.

    Attributes:
        path: Of the module that it would follow.
        ms: The backbone from its start to this module's end, a batch.
        share: ``ms`` over the whole backbone's, a fraction in [0, 1].
        head_ms: The exit head that would hang here, a batch.
        chosen: Whether it is proposed.
        module: Class of that module.
    """

    path: str
    ms: float
    share: float
    head_ms: float
    chosen: bool
    module: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Placement(Printed):
    """Places for exits, and the milliseconds that say so; print it for a table.

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

    def _title(self) -> str:
        whole = milliseconds(self.total_ms)
        return f"milliseconds a batch of {self.batch_size}, medians; the whole takes {whole}"

    def _parts(self) -> list[Table | Lines]:
        rows = [
            (
                row.path,
                row.module,
                milliseconds(row.ms),
                percent(row.share),
                milliseconds(row.head_ms),
                f"exit {self.at.index(row.path)}" if row.chosen else "",
            )
            for row in self.candidates
        ]
        return [Table(("after", "module", "so far", "share", "head", "proposed"), rows, words=2)]

    def _records(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.candidates]


def place(
    backbone: nn.Module,
    *,
    num_exits: int,
    example: Tensor | Features,
    num_classes: int,
    rounds: int = 15,
) -> Placement:
    """Propose where to put exits, from the time that each piece of a backbone takes.

    The cuts share the backbone's milliseconds out as evenly as its pieces allow. How accurate an
    exit is at its place is not looked at: that takes training.

    Args:
        backbone: As for :func:`~offramp.add_exits`.
        num_exits: Exits to place, at least 2; the final exit at the backbone's end counts.
        example: A batch like those that will be run, shape (B, ...), on the backbone's device; a
            tuple where the backbone takes several inputs.
        num_classes: Number of classes C.
        rounds: How often the backbone is run; medians count.
    Returns:
        The proposed paths and the milliseconds behind them.
    Raises:
        InvalidArgumentError: If there are fewer than two exits, more than there are places where
            one can pay, or no rounds, or the backbone does not end in ``num_classes`` outputs.
        ShapeError: If the example has no sample in it.
        BackboneCutError: If the backbone cannot be cut.
    """
    _check_at_least("num_exits", num_exits, 2)
    _check_at_least("rounds", rounds, 1)
    inputs = as_features(example)
    paths = cut_paths(backbone, inputs)
    stages, stage_features = cut_stages(backbone, paths, num_classes=num_classes, inputs=inputs)
    heads = _fitting_heads(paths, stages, inputs, stage_features)
    pieces = dict(zip([*paths, THE_END], stages, strict=True))
    with evaluation_mode(nn.ModuleList([*stages, *heads.values()])), torch.inference_mode():
        piece_ms, head_ms = _profile(pieces, heads, inputs, rounds)
    found = propose(piece_ms, head_ms, num_exits=num_exits, batch_size=len(inputs[0]))
    named = (
        replace(row, module=type(backbone.get_submodule(row.path)).__name__)
        for row in found.candidates
    )
    return replace(found, candidates=tuple(named))


def propose(
    piece_ms: Mapping[str, float],
    head_ms: Mapping[str, float],
    *,
    num_exits: int,
    batch_size: int,
) -> Placement:
    """Propose where to put exits, from milliseconds that were measured.

    An exit after which less time remains than its own head takes cannot pay: it is no candidate.
    """
    until_ms = dict(zip(piece_ms, accumulate(piece_ms.values()), strict=True))
    total_ms = sum(piece_ms.values())
    paying = [path for path in head_ms if total_ms - until_ms[path] >= head_ms[path]]
    if num_exits > len(paying) + 1:
        raise InvalidArgumentError(
            f"The 'num_exits' parameter must be an int of at most {len(paying) + 1}: this backbone "
            f"has {len(paying)} places where an exit can pay, and its end. Got {num_exits}."
        )
    cuts = choose_cuts([until_ms[path] for path in paying], total=total_ms, num_exits=num_exits)
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


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidArgumentError(
            f"The {name!r} parameter must be an int of at least {least}. Got {value}."
        )


def _fitting_heads(
    paths: Sequence[str],
    stages: Sequence[nn.Module],
    inputs: Features,
    stage_features: Sequence[Features],
) -> dict[str, nn.Module]:
    """A head for the features after each piece but the last, where one fits."""
    heads = {}
    for k, path in enumerate(paths):
        with suppress(ShapeError):
            heads[path] = choose_head(stages, inputs, stage_features, after=k, path=path)
    return heads


def _profile(
    pieces: Mapping[str, nn.Module],
    heads: Mapping[str, nn.Module],
    inputs: Features,
    rounds: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of each piece and head, run one after the other as the network would."""
    piece_laps: dict[str, list[float]] = {path: [] for path in pieces}
    head_laps: dict[str, list[float]] = {path: [] for path in heads}
    for _ in range(_WARM_UP_ROUNDS + rounds):
        features = _clones(inputs)
        for path, piece in pieces.items():
            output, elapsed_ms = _timed(piece, features)
            features = as_features(output)
            piece_laps[path].append(elapsed_ms)
            if path in heads:
                _, elapsed_ms = _timed(heads[path], features)
                head_laps[path].append(elapsed_ms)
    return _medians(piece_laps), _medians(head_laps)


def _clones(inputs: Features) -> Features:
    """Copies, since the first module may work in place."""
    return tuple(tensor.clone() for tensor in inputs)


def _timed(module: nn.Module, features: Features) -> tuple[Tensor | Features, float]:
    synchronise: Callable[[], None] = (
        torch.cuda.synchronize if features[0].is_cuda else lambda: None
    )
    synchronise()
    start = time.perf_counter()
    output: Tensor | Features = module(*features)
    synchronise()
    return output, 1e3 * (time.perf_counter() - start)


def _medians(laps: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {path: median(values[_WARM_UP_ROUNDS:]) for path, values in laps.items()}
