"""Accuracy and cost of a runner, as figures and as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from offramp.calibration.asked import Asked
from offramp.measure.intervals import Interval
from offramp.tables import Brief, Lines, Printed, Table, percent, points


@dataclass(frozen=True, kw_only=True, repr=False)
class ExitEvaluation(Brief):
    """One exit.

    Attributes:
        index: Its number in the network, from 0.
        accuracy: Over all samples at that exit, a fraction; of pixels, where each has a class.
        share: Of the samples that left there, a fraction.
        macs: Of the samples that left there, the mean; where none did, that of running every head.
        mean_iou: Over all samples at that exit; None where a sample has one class.
    """

    index: int
    accuracy: float
    share: float
    macs: int
    mean_iou: float | None = None


@dataclass(frozen=True, kw_only=True)
class BlocksEvaluation:
    """The blocks of a network that skips them.

    Attributes:
        run_rates: Share of the samples that ran each gated block, in order.
        saved: Share of the gated blocks that a sample skips, the mean.
        macs_saved: Share of the plain network's MACs that a sample saves, the mean, gates counted;
            below 0 where the gates cost more than is skipped.
    """

    run_rates: tuple[float, ...]
    saved: float
    macs_saved: float


@dataclass(frozen=True, kw_only=True)
class TokensEvaluation:
    """The tokens of a network in which they halt.

    Attributes:
        per_layer: Tokens of a sample that run each layer, the mean, in order.
        mean_depth: Layers that a token runs, the mean over all tokens.
        macs_saved: Share of the plain network's MACs that a sample saves, the mean; attention's
            part counted by the pairs of tokens that run.
    """

    per_layer: tuple[float, ...]
    mean_depth: float
    macs_saved: float


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another network beside which the adaptive one is judged.

    Attributes:
        name: Of its run.
        macs: MACs per sample of it, all of which every sample takes.
    """

    name: str
    macs: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation(Printed):
    """Figures of a runner on a data set; print it for a table.

    Attributes:
        num_samples: How many samples were answered.
        accuracy: Of the adaptive network, a fraction.
        mean_macs: Mean MACs per sample that ran, heads and gates counted.
        plain_macs: MACs per sample of the plain network.
        final_exit_accuracy: Of the final exit on every sample, every block run; where tokens halt,
            with a threshold of 1, at which they stay longest.
        plain_accuracy: Of a plain network trained as long; None where none was given.
        exits: Figures of each exit; exits that are off in a bundle have none.
        blocks: Figures of the gated blocks; None where blocks are not skipped.
        tokens: Figures of the tokens; None where they do not halt.
        mean_iou: Of the adaptive network; this and the next two are None where a sample has one
            class.
        final_exit_mean_iou: Of the final exit on every sample.
        plain_mean_iou: Of a plain network trained as long; None too where none was given.
        drop: What the adaptive network loses against the final exit, paired sample by sample:
            mean IoU where pixels have classes, else accuracy; below 0 where it gains.
        asked: What the policy was asked for; None where nothing is known of it.
        got: What came of that on these samples: the drop, the risk, or mean MACs as a share of the
            plain network's; None for milliseconds, which ``time_runner`` measures.
        rival: The network that ``plain_accuracy`` is of; None where it has no name.
    """

    num_samples: int
    accuracy: float
    mean_macs: float
    plain_macs: int
    final_exit_accuracy: float
    plain_accuracy: float | None
    exits: tuple[ExitEvaluation, ...]
    blocks: BlocksEvaluation | None = None
    tokens: TokensEvaluation | None = None
    mean_iou: float | None = None
    final_exit_mean_iou: float | None = None
    plain_mean_iou: float | None = None
    drop: Interval | None = None
    asked: Asked | None = None
    got: Interval | None = None
    rival: Rival | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain values for JSON, under the keys of ``offramp evaluate --json``."""
        content = asdict(self)
        content["exits"] = list(content["exits"])
        if self.mean_iou is None:
            for figures in (content, *content["exits"]):
                for name in [name for name in figures if name.endswith("mean_iou")]:
                    del figures[name]
        for name in ("drop", "asked", "got", "rival"):
            if content[name] is None:
                del content[name]
        for name, rates in (("blocks", "run_rates"), ("tokens", "per_layer")):
            if content[name] is None:
                del content[name]
            else:
                content[name][rates] = list(content[name][rates])
        return content

    @property
    def _words(self) -> Words:
        """Words for what this network does."""
        if self.blocks is not None:
            whole = "every block run"
            return Words("accuracy with skipping", whole, "skipping", whole)
        if self.tokens is not None:
            whole = "with a threshold of 1"
            return Words(
                "accuracy, tokens dropped", whole, "dropping tokens", f"the network {whole}"
            )
        less = f"{self._quality} with early exit"
        return Words(less, "final exit alone", "early exit", "the final exit")

    @property
    def _quality(self) -> str:
        return "accuracy" if self.mean_iou is None else "mean IoU"

    def _title(self) -> str:
        return f"{self.num_samples:,} samples"

    def _parts(self) -> list[Table | Lines]:
        return [self._table(), Lines([*self._quality_lines(), *self._asked_lines()])]

    def _records(self) -> list[dict[str, Any]]:
        if self.blocks is not None:
            return [{"block": k, "run_rate": rate} for k, rate in enumerate(self.blocks.run_rates)]
        if self.tokens is not None:
            per_layer = enumerate(self.tokens.per_layer, start=1)
            return [{"layer": number, "tokens": mean} for number, mean in per_layer]
        rows = [asdict(row) for row in self.exits]
        if self.mean_iou is None:
            for row in rows:
                del row["mean_iou"]
        return rows

    def _table(self) -> Table:
        if self.blocks is not None:
            rates = enumerate(self.blocks.run_rates)
            return Table(
                ("gated block", "samples running it"),
                [(str(k), percent(rate)) for k, rate in rates],
            )
        if self.tokens is not None:
            every, *_ = per_layer = self.tokens.per_layer  # all run the first layer
            return Table(
                ("layer", "tokens in it", "of all"),
                [
                    (str(number), f"{mean:.1f}", percent(mean / every))
                    for number, mean in enumerate(per_layer, start=1)
                ],
            )
        columns = ("exit", "accuracy alone", "samples leaving", "MACs")
        rows = [
            (str(row.index), percent(row.accuracy), percent(row.share), f"{row.macs:,}")
            for row in self.exits
        ]
        if self.mean_iou is None:
            return Table(columns, rows)
        ious = [percent(row.mean_iou) for row in self.exits]
        return Table(
            ("exit", "mean IoU alone", "pixel accuracy", "images leaving", "MACs"),
            [(number, iou, *others) for iou, (number, *others) in zip(ious, rows, strict=True)],
        )

    def _quality_lines(self) -> list[tuple[str, str]]:
        words, saved = self._words, 1 - self.mean_macs / self.plain_macs
        figures = (self.accuracy, self.final_exit_accuracy, self.plain_accuracy)
        if self.mean_iou is not None:
            figures = (self.mean_iou, self.final_exit_mean_iou or 0.0, self.plain_mean_iou)
        lines = [(words.less, percent(figures[0])), (words.whole, percent(figures[1]))]
        if figures[2] is not None:
            lines.append(self._rival_line(figures[2]))
        if self.blocks is not None:
            lines.append(("gated blocks run", percent(1 - self.blocks.saved)))
        if self.tokens is not None:
            depth = f"{self.tokens.mean_depth:.2f} of {len(self.tokens.per_layer)} layers"
            lines.append(("mean depth of a token", depth))
        change = f"{percent(abs(saved))} {'less' if saved >= 0 else 'more'}"
        return [
            *lines,
            ("mean MACs", f"{self.mean_macs:,.0f}, {change} than the plain network's"),
            ("plain network", f"{self.plain_macs:,} MACs (the same backbone, its last exit only)"),
        ]

    def _rival_line(self, quality: float) -> tuple[str, str]:
        if self.rival is None:
            return "plain, trained as long", percent(quality)
        size = "smaller " if self.rival.macs < self.plain_macs else ""
        return self.rival.name, (
            f"{percent(quality)} at its own {self.rival.macs:,} MACs, "
            f"{percent(self.rival.macs / self.plain_macs)} of the plain network's "
            f"(a {size}plain network, trained as long)"
        )

    def _asked_lines(self) -> list[tuple[str, str]]:
        words, lines = self._words, []
        is_drop = self.asked is not None and self.asked.target == "max_drop"
        is_plain = len(self.exits) == 1 and self.blocks is None and self.tokens is None
        if self.drop is not None and not is_drop and not is_plain:
            lines.append(("drop", _spread(self.drop, points)))
        if self.asked is not None:
            said = self.asked.in_words(way=words.way, last=words.last, of=self._quality)
            lines.append(("asked", said))
            if self.got is not None:
                got = _spread(self.got, points if is_drop else percent)
                lines.append(("got", f"{got}, on {self.num_samples:,} samples"))
        return lines


class Words(NamedTuple):
    """Words for a network.

    Attributes:
        less: Its accuracy.
        whole: That of all of it.
        way: What it does, as a noun.
        last: All of it, as a noun.
    """

    less: str
    whole: str
    way: str
    last: str


def _spread(found: Interval, form: Callable[[float], str]) -> str:
    low, high = (f"{100 * end:.2f}" for end in (found.low, found.high))
    return f"{form(found.value)} (95 % interval {low} to {high}, {found.method})"
