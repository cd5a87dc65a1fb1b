"""The examples do what they show."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_split_answers_every_image_over_two_machines(exported_run):
    command = [sys.executable, EXAMPLES / "split.py", exported_run, "--samples", "12"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    _, title, table = outcome.stdout.partition("12 images, one at a time")
    assert title
    # A row is: exit, who answered, images, right, milliseconds, fell back.
    rows = re.findall(r"(\d)\D+(edge|cloud)\D+(\d+)\D", table)
    assert {place for exit_index, place, _ in rows if exit_index == "0"} <= {"edge"}
    assert {place for exit_index, place, _ in rows if exit_index != "0"} <= {"cloud"}
    assert sum(int(images) for _, _, images in rows) == 12
    assert "bytes on the link" in table
