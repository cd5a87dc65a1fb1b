"""The strict decoder: each kind of damage is one line that names the field."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.decoding import Count, Positive, Share, decode, decode_tagged, parse_json
from offramp.errors import ArtifactError, InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class Wheel:
    spokes: Count
    load: Share = 0.5

    def __post_init__(self) -> None:
        if self.spokes == 13:
            raise InvalidArgumentError("The 'spokes' parameter must not be 13. Got 13.")


@dataclass(frozen=True)
class Spare:
    wheel: Wheel


@dataclass(frozen=True, kw_only=True)
class Cart:
    wheels: tuple[Wheel, ...]
    spare: Wheel | None = None
    named: Mapping[str, Wheel] = field(default_factory=dict)
    pull: Literal["horse", "ox"] = "horse"
    length: Positive = 1.0
    is_new: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    cells: complex = 0j


WHEEL = {"spokes": 8}


@pytest.mark.parametrize(
    "text",
    [
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": 1, "a": 2}',
        '{"b": {"a": 1, "a": 1}}',
        "[" * 65 + "]" * 65,
        '{"a":' * 65 + "1" + "}" * 65,
        "[" * 100_000,
        "",
        "{",
        "{} 1",
        "{'a': 1}",
    ],
    ids=lambda text: text[:24],
)
def test_text_that_is_no_plain_json_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_what_is_wrong_with_text_is_said():
    with pytest.raises(ValueError, match="'a' is there twice"):
        parse_json('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 65 + "]" * 65)
    with pytest.raises(ValueError, match="1e999 is out of range"):
        parse_json("1e999")


def test_deepest_and_largest_that_is_taken():
    assert parse_json("[" * 63 + "1e308" + "]" * 63)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=20))
def test_json_is_parsed_as_the_standard_library_does(value):
    assert parse_json(json.dumps(value)) == value


def test_a_dataclass_comes_back():
    content = {
        "wheels": [WHEEL, {"spokes": 0, "load": 1}],
        "spare": None,
        "named": {"left": WHEEL},
        "about": {"any": [1, {"thing": None}]},
    }
    made = decode(content, Cart)
    assert made.wheels == (Wheel(spokes=8), Wheel(spokes=0, load=1.0))
    assert made.named == {"left": Wheel(spokes=8)}
    assert made.about == content["about"]
    assert isinstance(made.wheels[1].load, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wheels": [{}]}, r"^wheels\[0\]: Object lacks the field spokes"),
        ({"wheels": [{"spokes": "8"}]}, r"^wheels\[0\]\.spokes: Expected int, got '8'$"),
        ({"wheels": [{"spokes": True}]}, r"^wheels\[0\]\.spokes: Expected int, got True$"),
        ({"wheels": [{"spokes": 8.0}]}, r"spokes: Expected int, got 8\.0$"),
        ({"wheels": [{"spokes": None}]}, "spokes: Expected int, got None$"),
        ({"wheels": [{"spokes": -1}]}, "spokes: Expected int >= 0, got -1$"),
        ({"wheels": [{"spokes": 2**53 + 1}]}, "spokes: Expected int <= "),
        ({"wheels": [{"spokes": 10**400}]}, r"spokes: Expected int <= .*\.\.\.$"),
        ({"wheels": [{"spokes": 13}]}, r"^wheels\[0\]: The 'spokes' parameter must not be 13"),
        ({"wheels": [WHEEL | {"load": math.nan}]}, "load: Expected float >= 0.0, got nan$"),
        ({"wheels": [WHEEL | {"load": math.inf}]}, "load: Expected float <= 1.0, got inf$"),
        ({"wheels": [WHEEL | {"load": 10**400}]}, r"^wheels\[0\]\.load: Number out of range$"),
        ({"wheels": [WHEEL | {"load": False}]}, "load: Expected float, got False$"),
        ({"wheels": {"0": WHEEL}}, "^wheels: Expected array, got {"),
        ({"wheels": "many"}, "^wheels: Expected array, got 'many'$"),
        ({"spare": [8]}, r"^spare: Expected object \| null, got \[8\]$"),
        ({"named": {"left": {"spokes": "8"}}}, "spokes|left"),
        ({"pull": "cat"}, "^pull: Invalid enum value 'cat'$"),
        ({"pull": ["ox"]}, r"^pull: Expected str, got \['ox'\]$"),
        ({"length": 0}, "^length: Expected float >= 1e-30, got 0$"),
        ({"length": 1e300}, "^length: Expected float <= 1e\\+30, got 1e\\+300$"),
        ({"is_new": 1}, "^is_new: Expected bool, got 1$"),
        ({"about": [1]}, "^about: Expected object, got"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    with pytest.raises(ArtifactError, match=message) as refused:
        decode({"wheels": [WHEEL], **change}, Cart)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "^Object contains unknown field 'colour'$"),
        ({"wheels": [WHEEL, WHEEL | {"tyre": 1}]}, r"^wheels\[1\]: .* unknown field 'tyre'$"),
        ({"spare": WHEEL | {"tyre": 1}}, "^spare: .* unknown field 'tyre'$"),
        ({"named": {"left": WHEEL | {"tyre": 1}}}, "^named.left: .* unknown field 'tyre'$"),
    ],
)
def test_an_unknown_field_is_named_at_every_depth(change, message):
    with pytest.raises(ArtifactError, match=message):
        decode({"wheels": [WHEEL], **change}, Cart)


@pytest.mark.parametrize("content", [None, [], "cart", 1, {1: 2}])
def test_what_is_no_object_is_refused(content):
    with pytest.raises(ArtifactError, match=r"Expected"):
        decode(content, Cart)


def test_a_tag_names_the_dataclass():
    kinds = {"wheel": Wheel, "spare": Spare}
    assert decode_tagged({"kind": "wheel", "spokes": 3}, kinds) == Wheel(spokes=3)
    with pytest.raises(ArtifactError, match="wheel: Object contains unknown field 'kind'"):
        decode_tagged({"kind": "spare", "wheel": WHEEL | {"kind": "wheel"}}, kinds)
    with pytest.raises(ArtifactError, match="unknown field 'tyre'"):
        decode_tagged({"kind": "wheel", "spokes": 3, "tyre": 1}, kinds)
    for wrong in ({"spokes": 3}, {"kind": "cat"}, {"kind": ["wheel"]}, [], None):
        with pytest.raises(ArtifactError, match=r"^kind: Expected one of wheel, spare, got"):
            decode_tagged(wrong, kinds)


def test_a_hook_makes_what_json_has_not():
    def pair(kind, value):
        if kind is not complex or len(value) != 2:
            raise ValueError("a pair was expected")
        return complex(*value)

    assert decode({"wheels": [], "cells": [1, 2]}, Cart, hook=pair).cells == 1 + 2j
    with pytest.raises(ArtifactError, match="cells: a pair was expected"):
        decode({"wheels": [], "cells": [1]}, Cart, hook=pair)


@dataclass(frozen=True)
class Filled:
    """A dataclass that fills in what is not given."""

    sizes: tuple[Wheel, ...] | None = None

    def __post_init__(self) -> None:
        if self.sizes is None:
            object.__setattr__(self, "sizes", (Wheel(spokes=1),))


def test_a_field_that_the_dataclass_fills_in_may_be_null():
    assert decode({"sizes": None}, Filled) == decode({}, Filled) == Filled()
    with pytest.raises(ArtifactError, match=r"sizes\[0\]: .* unknown field 'tyre'"):
        decode({"sizes": [WHEEL | {"tyre": 1}]}, Filled)
