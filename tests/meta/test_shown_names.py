"""What README, docs and examples import is public, and is called as it is defined."""

import ast
import functools
import importlib
import inspect
import json
import re
import textwrap

import pytest

import offramp

PUBLIC_MODULES = (
    "offramp",
    "offramp.errors",
    "offramp.model.heads",
    "offramp.runtime",
    "offramp.serving",
    "offramp.serving.server",
)
"""All that a user may import from; everything else may move."""

IMPORT = re.compile(r"^\s*from (offramp[\w.]*) import (\([^)]*\)|[^#\n]*)", re.MULTILINE)
DOTTED = re.compile(r"(?<![\w./-])offramp(?:\.[A-Za-z_]\w*)+")
PROMPT = re.compile(r"^ *(?:>>>|\.\.\.) (.*)", re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
STATEMENT = re.compile(r"^(?:from [\w.]+ import |import |\w+ = )", re.MULTILINE)


@functools.cache
def names_of(module_name: str) -> set[str]:
    module = importlib.import_module(module_name)
    if hasattr(module, "__all__"):
        return {*module.__all__, "__version__"} if module is offramp else set(module.__all__)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module_name
    }


def is_public(dotted: str) -> bool:
    """True of a public module, a public name in one, and an attribute of that."""
    parts = dotted.split(".")
    homes = [(".".join(parts[:n]), parts[n]) for n in range(1, len(parts))]
    return dotted in PUBLIC_MODULES or any(
        module in PUBLIC_MODULES and name in names_of(module) for module, name in homes
    )


def private_names(text: str) -> list[str]:
    """What a text imports from Offramp, or names with its module, that is not public."""
    named = DOTTED.findall(IMPORT.sub("", text))
    for module, names in IMPORT.findall(text):
        parts = [part.split(" as ")[0].strip() for part in names.strip("()\n ").split(",")]
        named += [f"{module}.{part}" for part in parts if part]
    return [name for name in named if not is_public(name)]


def test_names_that_pages_show_are_public(page):
    assert private_names(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", ["split.py", "tutorial.ipynb"])
def test_names_that_examples_use_are_public(project, name):
    text = (project / "examples" / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    assert "offramp" in text
    assert private_names(text) == []


def test_names_that_docstrings_show_are_public(project):
    sources = [*(project / "src").rglob("*.py")]
    shown = {path.name: "\n".join(PROMPT.findall(path.read_text("utf-8"))) for path in sources}
    assert any("import" in text for text in shown.values())
    assert {name: private_names(text) for name, text in shown.items() if private_names(text)} == {}


def test_private_names_are_found():
    shown = """
import offramp.zoo.mlp
from offramp.calibration.search import evaluate_thresholds
from offramp import (
    fit,
    fitt as f,
)
from offramp.runtime import Session
offramp.FitConfig.epochs; `offramp.data.images` and offramp.collectt(network)
"""
    assert private_names(shown) == [
        "offramp.zoo.mlp",
        "offramp.data.images",
        "offramp.collectt",
        "offramp.calibration.search.evaluate_thresholds",
        "offramp.fitt",
    ]


def test_indented_python_calls_public_names_as_they_are_defined(page):
    """It is not run, since it needs servers or a hub."""
    for code in indented_python(page.read_text(encoding="utf-8")):
        for call in [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]:
            if isinstance(call.func, ast.Name) and call.func.id in offramp.__all__:
                keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
                inspect.signature(getattr(offramp, call.func.id)).bind(*call.args, **keywords)


def indented_python(text: str) -> list[str]:
    blocks = [textwrap.dedent(block) for block in INDENTED.findall(text)]
    return [block for block in blocks if STATEMENT.search(block)]


def test_indented_python_is_found(project):
    assert len(indented_python((project / "README.md").read_text(encoding="utf-8"))) >= 3
