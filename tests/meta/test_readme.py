"""The README's Python blocks run, in order, as one program."""

import re

import pytest

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_python_blocks_run(project, tmp_path, monkeypatch):
    readme = project / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    blocks = list(BLOCK.finditer(text))
    if not blocks:
        pytest.skip("README.md has no Python block")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks:
        lines_before = text.count("\n", 0, block.start(1))
        code = compile("\n" * lines_before + block[1], readme, "exec")
        exec(code, names)
