"""The source keeps to its layers, and tracked files name no place of one machine."""

import subprocess
import sys

import pytest

# Put together here, so that this file does not hold what it looks for.
REGISTRIES = [f"{host}.org" for host in ("pypi", "pythonhosted", "download.pytorch", "anaconda")]
PLACES = [f"/{folder}/" for folder in ("work", "root", "home", "Users")]


def test_layers_are_kept(project):
    code = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=120
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


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
