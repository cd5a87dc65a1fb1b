"""Two ways to call the command line, and runs that several tests share."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from offramp.cli import main
from offramp.evaluation import profiling, stopwatch, timing
from offramp.runs import hub

SETTINGS = {
    "widths": "128,256,256",
    "augment": "false",
    "batch_size": 64,
    "learning_rate": 0.002,
}
"""Of the runs that tests share, so that their figures stay when the recipe is tuned."""


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str


def call(*arguments: object) -> Outcome:
    """Run a command in this process, which has paid for the imports already."""
    stdout, stderr = io.StringIO(), io.StringIO()
    argv = ["offramp", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as stopped,
    ):
        main()
    return Outcome(int(stopped.value.code or 0), stdout.getvalue(), stderr.getvalue())


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start a command as a user does, in a process of its own.

    It gets one thread, so that weights can be compared bit by bit.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "offramp", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    with process:
        try:
            stdout, stderr = process.communicate(timeout=300)
        finally:
            process.kill()
    return Outcome(process.returncode, stdout, stderr)


@pytest.fixture(scope="module", autouse=True)
def _short_timing() -> Iterator[None]:
    """Time in two rounds of eight samples or batches: no test here asks how exact a time is."""
    with (
        mock.patch.object(timing, "_MOST_S", 0.0),
        mock.patch.object(stopwatch, "_MAX_BATCHES", 8),
        mock.patch.object(stopwatch, "LEAST_SAMPLES", 8),
        mock.patch.object(profiling, "_SECONDS", 0.0),
    ):
        yield


@pytest.fixture(scope="session")
def offramp() -> Callable[..., Outcome]:
    return call


@pytest.fixture
def figures_of(offramp: Callable[..., Outcome]) -> Callable[..., dict[str, Any]]:
    """What a command says as JSON."""

    def figures(*arguments: object) -> dict[str, Any]:
        outcome = offramp(*arguments, "--json", "-")
        assert (outcome.code, outcome.stderr) == (0, "")
        said: dict[str, Any] = json.loads(outcome.stdout)
        return said

    return figures


@pytest.fixture(scope="session")
def start_offramp() -> Callable[..., subprocess.Popen[str]]:
    return start


@pytest.fixture(scope="session")
def finish_offramp() -> Callable[[subprocess.Popen[str]], Outcome]:
    return finish


@pytest.fixture(scope="session")
def train_command() -> list[str]:
    """How the run that tests share is trained, but for its folder."""
    settings = [text for key, value in SETTINGS.items() for text in ("--set", f"{key}={value}")]
    return ["train", "digits-mlp", "--epochs", "8", *settings]


@pytest.fixture(scope="session")
def training(
    shared: Callable[[str, Callable[[Path], object]], Path], train_command: list[str]
) -> tuple[Path, Outcome]:
    """The default recipe, trained for eight epochs by a real process: its folder and output."""

    def train(folder: Path) -> None:
        outcome = finish(start(*train_command, "--out", folder / "run"))
        assert outcome.code == 0, outcome.stderr
        (folder / "outcome.json").write_text(json.dumps(asdict(outcome)))

    folder = shared("digits", train)
    return folder / "run", Outcome(**json.loads((folder / "outcome.json").read_text()))


@pytest.fixture(scope="session")
def export_digits(
    shared: Callable[[str, Callable[[Path], object]], Path], training: tuple[Path, Outcome]
) -> Callable[[str], Path]:
    """Set thresholds of the shared run by hand and export it: a folder to copy from.

    What the command printed is kept in ``said.txt`` beside it.
    """

    def exported(thresholds: str) -> Path:
        def build(folder: Path) -> None:
            run = copy_run(training[0], folder / "run")
            assert call("calibrate", run, "--thresholds", thresholds).code == 0
            outcome = call("export", run)
            assert (outcome.code, outcome.stderr) == (0, "")
            (folder / "said.txt").write_text(outcome.stdout)

        return shared(f"digits {thresholds}", build) / "run"

    return exported


def copy_run(trained: Path, folder: Path) -> Path:
    """The run without what training leaves behind, and without a policy."""
    ignore = shutil.ignore_patterns("logs", "last.ckpt", "policy.json")
    return Path(shutil.copytree(trained, folder, ignore=ignore))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and no data sets around."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OFFRAMP_DATA", raising=False)
    return tmp_path


@pytest.fixture
def run(workplace: Path, training: tuple[Path, Outcome]) -> Path:
    """A trained run that a test may change: the folder ``run`` in the current one, no policy."""
    return copy_run(training[0], workplace / "run")


@pytest.fixture
def calibrated_run(run: Path) -> Path:
    """The run with thresholds set by hand that spread the samples over the exits."""
    assert call("calibrate", run, "--thresholds", "0.4,0.6").code == 0
    return run


@pytest.fixture
def exported_run(workplace: Path, export_digits: Callable[[str], Path]) -> Path:
    """The run with those thresholds, and its bundle in ``bundle``."""
    return Path(shutil.copytree(export_digits("0.4,0.6"), workplace / "run"))


@pytest.fixture
def unfinished_run(run: Path, training: tuple[Path, Outcome]) -> Path:
    """The run as a kill after the last epoch leaves it: a checkpoint, no weights."""
    (run / "model.safetensors").unlink()
    shutil.copy(training[0] / "last.ckpt", run)
    return run


@pytest.fixture
def edit_json(workplace: Path) -> Callable[..., None]:
    """Change values in a JSON file: ``edit_json(path, recipe__data=...)`` sets recipe.data."""

    def edit(path: Path, **changes: object) -> None:
        content = json.loads(path.read_text())
        for name, value in changes.items():
            *parents, key = name.split("__")
            inner = content
            for parent in parents:
                inner = inner[parent]
            inner[key] = value
        path.write_text(json.dumps(content))

    return edit


@pytest.fixture
def write_parquet(workplace: Path) -> Callable[..., None]:
    """Write images in the Hugging Face convention, without class names in the metadata."""

    def write(name: str, images: Sequence[npt.NDArray[np.uint8]], labels: Sequence[int]) -> None:
        encoded = []
        for pixels in images:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format="PNG")
            encoded.append({"bytes": file.getvalue(), "path": None})
        (workplace / name).parent.mkdir(exist_ok=True)
        columns = {"image": encoded, "label": pa.array(labels, pa.int64())}
        pq.write_table(pa.table(columns), workplace / name)

    return write


@pytest.fixture
def pushed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for a repository of the hub: empty until something is pushed."""
    repository = tmp_path_factory.mktemp("hub") / "commit"

    class Recorder:
        def __init__(self, **who: object) -> None:
            self.who = who

        def create_repo(self, repo_id: str, **how: object) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

        def model_info(self, repo_id: str) -> SimpleNamespace:
            return SimpleNamespace(private=True)

        def upload_folder(
            self, *, repo_id: str, folder_path: str, **how: object
        ) -> SimpleNamespace:
            shutil.copytree(folder_path, repository)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

        def snapshot_download(self, repo_id: str, **how: object) -> str:
            return str(repository)

    monkeypatch.setattr(hub, "HfApi", Recorder)
    return repository


@pytest.fixture
def refuses(workplace: Path) -> Callable[..., str]:
    """Assert that a command ends in one clear line, exit code 2, and nothing written anywhere."""

    def check(*arguments: object, words: tuple[str, ...]) -> str:
        before = contents(workplace)
        outcome = call(*arguments)
        assert outcome.code == 2, outcome
        _assert_one_line(outcome.stderr, words)
        assert contents(workplace) == before
        return outcome.stderr

    return check


@pytest.fixture(scope="session")
def assert_one_line() -> Callable[[str, tuple[str, ...]], None]:
    return _assert_one_line


def _assert_one_line(stderr: str, words: tuple[str, ...]) -> None:
    assert stderr.startswith("offramp: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, with what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
