"""The source keeps to its layers and sizes, and tracked files name no place of one machine."""

import ast
import subprocess
import sys

import pytest

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Put together here, so that this file does not hold what it looks for.
REGISTRIES = [f"{host}.org" for host in ("pypi", "pythonhosted", "download.pytorch", "anaconda")]
PLACES = [f"/{folder}/" for folder in ("work", "root", "home", "Users")]


@pytest.fixture(scope="module")
def sources(project):
    return {
        str(path.relative_to(project)): path.read_text(encoding="utf-8")
        for path in (project / "src" / "offramp").rglob("*.py")
    }


def test_layers_are_kept(project):
    code = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=120
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_files_are_short(sources):
    lengths = {path: len(text.splitlines()) for path, text in sources.items()}
    assert lengths
    assert {path: n for path, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short(sources):
    lengths = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert lengths
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("forbidden", [*REGISTRIES, *PLACES])
def test_tracked_files_name_no_registry_and_no_place_of_one_machine(project, forbidden):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=project, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    paths = [project / name for name in listed.stdout.split("\0") if name]
    found = [
        str(path) for path in paths if path.is_file() and forbidden.encode() in path.read_bytes()
    ]
    assert found == []
