"""Every script of the repository can be imported and says how to use it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for f in ("benchmarks", "examples")
    for path in (ROOT / f).glob("*.py")
)
CALL = re.compile(r"python ((?:benchmarks|examples)/\w+\.py)([^`\n]*)")
ASK_ALL = """
import contextlib, io, json, os, runpy, sys, traceback

answers, places = {}, sys.path[1:]
for path in sys.argv[1:]:
    sys.argv, sys.path[:] = [path, "--help"], [os.path.dirname(path), *places]
    said, code = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
    answers[path] = [code, said.getvalue()]
print(json.dumps(answers))
"""
"""One process asks all of them, so that torch is imported once."""


@pytest.fixture(scope="module")
def answers():
    """Exit code and what was said, by script; the code is None where nothing runs."""
    command = [sys.executable, "-c", ASK_ALL, *SCRIPTS]
    wide = {**os.environ, "COLUMNS": "200"}  # no option is cut short
    outcome = subprocess.run(
        command, cwd=ROOT, env=wide, capture_output=True, text=True, timeout=300
    )
    assert outcome.returncode == 0, outcome.stderr
    return json.loads(outcome.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_says_how_to_use_it(answers, script):
    code, said = answers[script]
    is_run = '__name__ == "__main__"' in (ROOT / script).read_text(encoding="utf-8")
    assert code == (0 if is_run else None), said
    assert ("usage" in said.lower()) == is_run


def test_pages_call_scripts_as_they_are(answers, page):
    for script, options in CALL.findall(page.read_text(encoding="utf-8")):
        wanted = [word for word in options.split() if word.startswith("--")]
        assert [option for option in wanted if option not in answers[script][1]] == []


def test_there_are_scripts():
    assert {"benchmarks/guarantee.py", "examples/split.py"} <= set(SCRIPTS)
