"""Results that print as a table: one source for Python's ``print``, notebooks and commands."""

from __future__ import annotations

import html
import importlib
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from offramp.errors import MissingExtraError

_COLUMNS = 80
"""Lines are no longer, as far as words go."""
_MANY_THRESHOLDS = 5
_LEAST_WIDTH = 24
"""Of the names before what is said of them, so that pages look alike."""


@dataclass(frozen=True)
class Table:
    """Rows of words and figures.

    Attributes:
        columns: Their names.
        rows: As many cells as columns each.
        words: How many columns, from the first on, hold words: they stand at the left.
    """

    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    words: int = 0

    def __str__(self) -> str:
        cells = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if place < self.words else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    def to_html(self) -> str:
        """The same for a page."""

        def row(cells: Sequence[str], tag: str) -> str:
            return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

        body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in self.rows)
        return (
            f"<table><thead><tr>{row(self.columns, 'th')}</tr></thead><tbody>{body}</tbody></table>"
        )


@dataclass(frozen=True)
class Lines:
    """Names with what is said of each, below one another.

    Attributes:
        rows: Name and words.
    """

    rows: Sequence[tuple[str, str]]

    def __str__(self) -> str:
        width = max([_LEAST_WIDTH, *(len(name) for name, _ in self.rows)]) + 2
        indent = " " * width
        return "\n".join(
            textwrap.fill(
                f"{name:{width}}{said}", _COLUMNS, subsequent_indent=indent, break_on_hyphens=False
            )
            for name, said in self.rows
        )

    def to_html(self) -> str:
        """The same for a page."""
        return f"<pre>{html.escape(str(self))}</pre>"


class Brief:
    """A dataclass whose ``repr`` leaves out fields that are not set."""

    def __repr__(self) -> str:
        given = ((each.name, getattr(self, each.name)) for each in fields(self))  # type: ignore[arg-type]
        shown = ", ".join(f"{name}={value!r}" for name, value in given if value is not None)
        return f"{type(self).__name__}({shown})"


class Printed(Brief):
    """A result that prints as a table; dataclasses inherit it and say :meth:`_parts`."""

    def _title(self) -> str:
        """One line over the table."""
        raise NotImplementedError

    def _parts(self) -> list[Table | Lines]:
        """The table, and what stands below it."""
        raise NotImplementedError

    def _records(self) -> list[dict[str, Any]]:
        """A row of plain values for each row of the table."""
        raise NotImplementedError

    def to_text(self, about: str = "") -> str:
        """Write the result as a table.

        Args:
            about: Words to begin the title with, such as the name of a run.
        Returns:
            Lines without a line break at the end.
        """
        title = ", ".join(part for part in (about, self._title()) if part)
        return "\n\n".join([title, *map(str, self._parts())])

    def to_frame(self) -> Any:
        """Put the rows of the table into a ``pandas.DataFrame``, figures as they are.

        Returns:
            A data frame.
        Raises:
            MissingExtraError: If pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                "to_frame() needs pandas, which is not installed: pip install pandas"
            ) from error
        return pandas.DataFrame(self._records())

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        parts = "".join(part.to_html() for part in self._parts())
        return f"<p>{html.escape(self._title())}</p>{parts}"


def percent(fraction: float | None) -> str:
    """Format a fraction as a percentage; a dash for None."""
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def points(fraction: float) -> str:
    """Format a difference of fractions.

    Example:
        >>> points(0.01), points(0.0014)
        ('1 point', '0.14 points')
    """
    shown = f"{round(100 * fraction, 2) + 0:g}"
    return f"{shown} point" + ("" if shown == "1" else "s")


def factor(times: float) -> str:
    """Format how many times as fast something is, to about three digits.

    Example:
        >>> factor(1.549), factor(29.34), factor(168.84)
        ('1.55', '29.3', '169')
    """
    digits = 2 if times < 10 else 1 if times < 100 else 0
    return f"{times:,.{digits}f}"


def milliseconds(ms: float) -> str:
    """Format a time to about four digits.

    Example:
        >>> milliseconds(0.2312), milliseconds(12.529), milliseconds(1203.7)
        ('0.231', '12.53', '1,204')
    """
    digits = 3 if ms < 10 else 2 if ms < 100 else 1 if ms < 1000 else 0
    return f"{ms:,.{digits}f}"


def thresholds_in_words(thresholds: Sequence[float]) -> str:
    """Name the thresholds of a policy.

    Example:
        >>> thresholds_in_words((0.9123, float("inf")))
        '0.912, off'
    """
    digits = 3 if len(thresholds) < _MANY_THRESHOLDS else 2
    return ", ".join("off" if t == math.inf else f"{t:.{digits}f}" for t in thresholds)
