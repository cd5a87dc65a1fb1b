"""The public surface: what is promised is there, documented, and nothing else."""

import importlib
import inspect
import re

import pytest

import offramp
from offramp import errors

EAGER = {
    name
    for name, value in vars(offramp).items()
    if inspect.isclass(value)
    and value.__module__.startswith("offramp.")
    and name not in offramp._HOMES
}
ERROR_CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, Exception) and not issubclass(value, Warning)
}


def test_all_is_what_can_be_imported():
    assert set(offramp.__all__) == EAGER | offramp._HOMES.keys()
    assert len(set(offramp.__all__)) == len(offramp.__all__)
    assert dir(offramp) == sorted(offramp.__all__)


def test_every_error_is_public():
    assert ERROR_CLASSES.keys() <= EAGER


@pytest.mark.parametrize("name", offramp.__all__)
def test_public_name_is_documented_where_it_lives(name):
    value = getattr(offramp, name)
    home = offramp._HOMES.get(name, value.__module__)
    assert getattr(importlib.import_module(home), name) is value
    assert len((value.__doc__ or "").strip()) > 20


@pytest.mark.parametrize("name", offramp.__all__)
def test_public_methods_are_documented(name):
    value = getattr(offramp, name)
    undocumented = [
        member
        for member, method in vars(value).items()
        if not member.startswith("_")
        and (inspect.isfunction(method) or isinstance(method, property | classmethod))
        and not inspect.getdoc(method)
    ]
    assert undocumented == []


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        offramp.fitt  # noqa: B018


def test_tree_in_the_errors_docstring_is_the_tree_of_classes():
    entry = re.compile(r"^( +)(\w+Error)(?:\((\w+)\))?(?=\s|$)")
    found, parents = {}, []
    for line in errors.__doc__.splitlines():
        if match := entry.match(line):
            depth = (len(match[1]) - 4) // 2
            parents[depth:] = [match[2]]
            found[match[2]] = {parents[depth - 1] if depth else "Exception", match[3]} - {None}
    expected = {
        name: {base.__name__ for base in error.__bases__} for name, error in ERROR_CLASSES.items()
    }
    assert found == expected


def test_infeasible_target_carries_what_is_possible():
    assert errors.InfeasibleTargetError("too little", best_achievable=3.5).best_achievable == 3.5
