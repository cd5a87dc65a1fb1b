"""The public surface: what is promised is there, documented, and nothing else."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import offramp
from offramp import errors

STUB = ast.parse(Path(offramp.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
IMPORTED = {
    name.asname: node.module
    for node in STUB.body
    if isinstance(node, ast.ImportFrom)
    for name in node.names
}
ERROR_CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, Exception) and not issubclass(value, Warning)
}


def test_all_is_what_can_be_imported():
    assert {*offramp.__all__, "collect_sweep"} == IMPORTED.keys()
    assert dir(offramp) == offramp.__all__ == sorted(set(offramp.__all__))


USE = """
import offramp
reveal_type(offramp.add_exits)
reveal_type(offramp.OfframpError)
offramp.fitt
"""
CONFIG = """
[mypy]
follow_imports = silent
[mypy-torch.*,numpy.*,onnx.*,onnxscript.*,lightning.*,PIL.*,aiohttp.*,huggingface_hub.*]
follow_imports = skip
[mypy-transformers.*,tokenizers.*,tensorboard.*,safetensors.*,scipy.*,sklearn.*,pyarrow.*,pandas.*]
follow_imports = skip
"""


def test_type_checkers_know_names_and_signatures(project, tmp_path):
    (tmp_path / "use.py").write_text(USE)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    outcome = subprocess.run(
        [sys.executable, "-m", "mypy", "use.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(project / "src")},
        capture_output=True,
        text=True,
    )
    function, error, misspelt, *_ = outcome.stdout.splitlines()
    assert "num_classes: int" in function, outcome.stdout
    assert "-> offramp.model.multi_exit.MultiExitNetwork" in function
    assert "offramp.errors.OfframpError" in error
    assert 'Module has no attribute "fitt"' in misspelt


def test_every_error_is_public():
    assert ERROR_CLASSES.keys() <= set(offramp.__all__)


@pytest.mark.parametrize("name", offramp.__all__)
def test_public_name_is_documented_where_it_lives(name):
    value = getattr(offramp, name)
    assert getattr(importlib.import_module(IMPORTED[name]), name) is value
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
