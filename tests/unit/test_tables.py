import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from offramp.errors import MissingExtraError
from offramp.tables import Lines, Printed, Table


@dataclass(frozen=True, repr=False)
class Weather(Printed):
    degrees: float
    wind: float | None = None

    def _title(self):
        return "weather"

    def _parts(self):
        return [Table(("where", "degrees"), [("here <b>", "7.5")], words=1), Lines([("wind", "-")])]

    def _records(self):
        return [{"where": "here", "degrees": self.degrees}]


PRINTED = """\
today, weather

where     degrees
--------  -------
here <b>      7.5

wind                      -"""


def test_text_is_a_table_with_lines_below():
    assert Weather(7.5).to_text("today") == PRINTED
    assert str(Weather(7.5)) == PRINTED.removeprefix("today, ")


def test_fields_that_are_not_set_are_hidden():
    assert repr(Weather(7.5)) == "Weather(degrees=7.5)"
    assert repr(Weather(7.5, 3.0)) == "Weather(degrees=7.5, wind=3.0)"


def test_page_holds_the_same_and_no_markup_of_its_cells():
    page = Weather(7.5)._repr_html_()
    assert page.startswith("<p>weather</p><table><thead><tr><th>where</th>")
    assert "<td>here &lt;b&gt;</td><td>7.5</td>" in page


def test_long_lines_are_wrapped_under_what_is_said():
    said = Lines([("name", "word " * 20)])
    first, second = str(said).splitlines()
    assert max(map(len, (first, second))) <= 80
    assert first.startswith("name                      word word")
    assert second.startswith(" " * 26 + "word")


def test_frame_holds_plain_values(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    assert Weather(7.5).to_frame() == [{"where": "here", "degrees": 7.5}]


def test_frame_without_pandas_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"needs pandas.*pip install pandas"):
        Weather(7.5).to_frame()
