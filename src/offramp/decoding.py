"""One strict decoder of JSON from outside into the project's own frozen dataclasses.

The dataclass is the schema: its types, its defaults, the ranges in its annotations, and what its
``__post_init__`` checks. Nothing is converted silently, and a field that it lacks is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
from msgspec import Meta

from offramp.errors import ArtifactError

Kind = TypeVar("Kind")

Count = Annotated[int, Meta(ge=0, le=2**53)]
"""A number of things: MACs, bytes, tokens."""
Share = Annotated[float, Meta(ge=0, le=1)]
"""A fraction or a probability."""
Positive = Annotated[float, Meta(ge=1e-30, le=1e30)]
"""A number above 0 that float32 can hold."""

_MOST_LEVELS = 64
_ERROR = re.compile(r"(.*?)(?: - at `(?:key` in `)?\$\.?(.*)`)?", re.DOTALL)
"""The message of msgspec, and the place it names."""
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")
"""A field or an index on the way to a value."""
_LONGEST_VALUE = 60


def parse_json(text: str) -> Any:
    """Parse JSON as its standard has it, with each key once and finite numbers."""
    try:
        content = json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [content]
    for _ in range(_MOST_LEVELS):
        level = [inner for value in level for inner in _children(value)]
        if not level:
            return content
    raise ValueError("it is nested too deeply")


def decode(
    content: Any, kind: type[Kind], *, hook: Callable[[type, Any], Any] | None = None
) -> Kind:
    """Make a dataclass of parsed JSON."""
    try:
        made = msgspec.convert(content, kind, dec_hook=hook)
    except msgspec.ValidationError as error:
        raise ArtifactError(_in_words(str(error), content)) from error
    _refuse_unknown(content, made, "")
    return made


def decode_tagged(
    content: Any,
    kinds: Mapping[str, type[Any]],
    *,
    hook: Callable[[type, Any], Any] | None = None,
) -> Any:
    """Make the dataclass that the field ``kind`` names."""
    named = content.get("kind") if isinstance(content, Mapping) else None
    if not isinstance(named, str) or named not in kinds:
        raise ArtifactError(f"kind: Expected one of {', '.join(kinds)}, got {_shown(named)}")
    rest = {name: value for name, value in content.items() if name != "kind"}
    return decode(rest, kinds[named], hook=hook)


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        return iter(value.values())
    return iter(value if isinstance(value, list) else ())


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of an object's members; raise ValueError for a key that is there twice."""
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{_shown(name)} is there twice")
        made[name] = value
    return made


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text:.{_LONGEST_VALUE}} is out of range")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _refuse_unknown(content: Any, made: Any, place: str) -> None:
    """Raise for a field that a dataclass lacks: msgspec ignores those of dataclasses."""
    inside: Iterator[tuple[str, Any, Any]]
    if isinstance(content, Mapping) and is_dataclass(made):
        known = {field.name for field in fields(made) if field.init}
        for name in content:
            if name not in known:
                raise ArtifactError(_at(place, f"Object contains unknown field {_shown(name)}"))
        inside = ((f"{place}.{name}", content[name], getattr(made, name)) for name in content)
    elif isinstance(content, Mapping) and isinstance(made, Mapping):
        inside = ((f"{place}.{name}", content[name], made[name]) for name in content)
    elif isinstance(content, list | tuple) and isinstance(made, list | tuple):
        pairs = enumerate(zip(content, made, strict=True))
        inside = ((f"{place}[{i}]", value, item) for i, (value, item) in pairs)
    else:
        return
    for deeper, value, item in inside:
        if value is not item:  # else it was taken as it is
            _refuse_unknown(value, item, deeper)


def _in_words(text: str, content: Any) -> str:
    """Say where it went wrong first, and what came last."""
    found = _ERROR.fullmatch(text)
    message, place = (found[1], found[2] or "") if found else (text, "")
    message = message.replace("`", "").replace("missing required field ", "lacks the field ")
    if not message.startswith("Expected"):
        return _at(place, message)
    value = content
    for name, index in _STEP.findall(place):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):  # such as an item of a mapping
            return _at(place, message)
    return _at(place, f"{message.split(', got')[0]}, got {_shown(value)}")


def _at(place: str, message: str) -> str:
    place = place.removeprefix(".")
    return f"{place}: {message}" if place else message


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
