"""The pages' Python blocks run and print what stands below them; their commands exist."""

import contextlib
import io
import re
import shlex

import pytest

from offramp.cli.commands import load_command

BLOCK = re.compile(
    r"^```python\n((?:(?!```).*\n)*)```\n(?:prints\n\n((?: {4}.*\n)+))?", re.MULTILINE
)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
COMMAND_LINE = re.compile(r"^ {4}offramp (.+)$", re.MULTILINE)
COMMAND_IN_TEXT = re.compile(r"`offramp ([^`]+)`")
MAKE = re.compile(r"(?:^ {4}|`)make ([\w-]+)", re.MULTILINE)


def test_python_blocks_run_in_order_and_print_what_they_say(page, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        lines_before = text.count("\n", 0, block.start(1))
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("\n" * lines_before + block[1], page, "exec"), names)
        if block[2]:
            assert_ends_like(said.getvalue().splitlines(), block[2].splitlines())


def assert_ends_like(said: list[str], shown: list[str]) -> None:
    """The same words at the end, and about the same numbers: other processors round otherwise.

    Before them training may say how it goes.
    """
    texts = ["\n".join(said[-len(shown) :]), "\n".join(shown)]
    words = [NUMBER.sub("#", text).split() for text in texts]
    numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in texts]
    assert words[0] == words[1]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.15, abs=0.03)


def test_commands_exist_with_their_options(page):
    text = page.read_text(encoding="utf-8")
    for line in COMMAND_LINE.findall(text):
        name, *arguments = shlex.split(re.split(r" {2,}| # ", line)[0])
        load_command(name).make_context(name, arguments)  # a wrong one raises
    for mention in COMMAND_IN_TEXT.findall(text):
        for command in mention.split("|"):
            name, *arguments = shlex.split(command)
            assert {word for word in arguments if word.startswith("--")} <= options_of(name)


def options_of(name: str) -> set[str]:
    parameters = load_command(name).params
    return {option for p in parameters for option in (*p.opts, *p.secondary_opts)}


def test_make_targets_exist(project, page):
    makefile = (project / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
    assert set(MAKE.findall(page.read_text(encoding="utf-8"))) <= set(targets)


def test_every_python_block_is_found(pages):
    texts = [page.read_text(encoding="utf-8") for page in pages]
    found = [block for text in texts for block in BLOCK.finditer(text)]
    assert len(found) == sum(text.count("```python") for text in texts) >= 3
    assert sum(text.count("\nprints\n") for text in texts) == sum(bool(b[2]) for b in found)
