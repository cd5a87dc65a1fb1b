"""Small networks and data that several tests need; nothing is written outside tmp_path."""

import contextlib
import fcntl
import gc
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir
from torch import nn

from offramp.model.multi_exit import MultiExitNetwork
from offramp.routing.halting import HaltingNetwork
from offramp.routing.skip import SkipNetwork
from offramp.zoo.mlp import mlp
from offramp.zoo.skipnet import skipnet
from offramp.zoo.vit import vit

set_hypothesis_home_dir(tempfile.gettempdir())
settings.register_profile(
    "offramp", max_examples=25, database=None, deadline=None, derandomize=True
)
settings.load_profile("offramp")
# pytest listens to all loggers that hand nothing on, and to somebody who listens torch tells every
# step of an export: an eighth of its time.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _imports_stay():
    """Keep the garbage collector from looking through all that was imported, again and again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _quick_export():
    """Keep coverage's tracer out of torch's exporter, which takes twice as long under it.

    The network runs once beforehand as in an export, and that is measured.
    """
    export = torch.onnx.export

    def export_unmeasured(module, inputs, *arguments, **options):
        tracer = sys.gettrace()
        with (
            torch.no_grad(),
            mock.patch.object(torch.compiler, "is_exporting", return_value=True),
            mock.patch.object(torch.onnx, "is_in_onnx_export", return_value=True),
            contextlib.suppress(Exception),  # the exporter says what is wrong
        ):
            module(*inputs)
        sys.settrace(None)
        try:
            return export(module, inputs, *arguments, **options)
        finally:
            sys.settrace(tracer)

    with mock.patch.object(torch.onnx, "export", export_unmeasured if sys.gettrace() else export):
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Fill a folder once for all processes that test: ``shared(name, build)``. Only to be read.

    A name stands for one thing: whoever gives it gives the same ``build`` with it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which the workers share

    def make(name: str, build: Callable[[Path], object]) -> Path:
        folder = root / "shared" / name
        is_done, lock_file = (folder.parent / f"{name}.{what}" for what in ("done", "lock"))
        folder.parent.mkdir(exist_ok=True)
        with lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one who failed
                folder.mkdir()
                build(folder)
                is_done.touch()
        return folder

    return make


@pytest.fixture
def network() -> MultiExitNetwork:
    """Three exits, 6 inputs, 4 classes; stage MACs 30, 40, 56 and head MACs 20, 32, 28."""
    return mlp(in_features=6, widths=(5, 8, 7), num_classes=4).eval()


@pytest.fixture
def constant_network():
    """Build a network whose exit k says ``logits[k]``, whatever comes in."""

    def build(logits) -> MultiExitNetwork:
        heads = []
        for values in logits:
            head = nn.Linear(2, len(values))
            nn.init.zeros_(head.weight)
            head.bias.data = torch.tensor(values)
            heads.append(head)
        return MultiExitNetwork([nn.Identity() for _ in heads], heads).eval()

    return build


@pytest.fixture(scope="session")
def tiny_bundle(shared):
    """A bundle to be served: two exits, 6 inputs, 4 classes. Not to be written to."""
    from served import make_bundle

    return shared("served", lambda folder: make_bundle(folder / "tiny" / "bundle")) / "tiny/bundle"


@pytest.fixture
def skip_network() -> SkipNetwork:
    """Three gated blocks and five classes, for images of 3x16x16 that its gates tell apart."""
    network = skipnet(in_channels=3, widths=(8, 16), blocks=(2, 2), num_classes=5)
    for parameter in network.gates.parameters():
        nn.init.normal_(parameter)
    return network.eval()


@pytest.fixture
def halting_network() -> HaltingNetwork:
    """Four layers, nine patches and five classes, for images of 3x12x12 whose tokens halt apart."""
    return make_halting_network()


def make_halting_network() -> HaltingNetwork:
    torch.manual_seed(0)
    network = vit(
        in_channels=3,
        side=12,
        patch=4,
        width=16,
        depth=4,
        num_heads=2,
        num_classes=5,
        gate_scale=1.0,
        gate_center=1.0,
    )
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            nn.init.normal_(parameter, std=0.4)
    return network.eval()
