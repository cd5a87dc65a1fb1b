"""Committed runs, cut everywhere, over real sockets: as the undivided network on all test data."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import offramp
from offramp.inference.agreement import answer_in_batches, compare_with_all_exits
from offramp.runtime.part import cuts
from offramp.training.run import load_batches

RUNS = Path(__file__).parents[2] / "benchmarks" / "runs"


@pytest.fixture(scope="module", params=["emnist-convnet", "cifar10-resnet"])
def compared(request, tmp_path_factory):
    """A committed run, its bundle, a cloud of it in a process of its own, and all test images."""
    if "OFFRAMP_DATA" not in os.environ:
        pytest.skip("OFFRAMP_DATA is not set")
    run = offramp.load(RUNS / request.param)
    batches, _, _ = load_batches(run.require_recipe(), "test")
    inputs, _ = batches.__getitems__(range(len(batches)))
    folder = tmp_path_factory.mktemp("split") / request.param
    bundle = offramp.export(run.network, run.policy, folder, inputs[:256], plain=False)
    command = [sys.executable, "-m", "offramp", "cloud", str(folder), "--http-port", "0"]
    with subprocess.Popen(
        [*command, "--grpc-port", "-1"], stdout=subprocess.PIPE, text=True
    ) as cloud:
        found = re.search(r"http://[\d.]+:\d+", cloud.stdout.readline())
        yield run, bundle, inputs, found[0]
        cloud.terminate()


@pytest.mark.slow
@pytest.mark.data
def test_every_cut_agrees_on_all_test_images(compared):
    run, bundle, inputs, url = compared
    assert len(inputs) >= 10_000
    for cut in cuts(bundle)[:-1]:
        link = offramp.HttpLink(url, bundle, name=bundle.folder.name, split_after=cut)
        config = offramp.EdgeConfig(deadline_ms=60_000)
        edge = offramp.EdgeRunner(bundle, split_after=cut, link=link, config=config)
        answers = answer_in_batches(edge, inputs, batch_size=256)
        agreement = compare_with_all_exits(answers, run.network, run.policy, inputs)
        print(f"{bundle.folder.name}, cut after {cut}: {agreement}, {edge.traffic}")
        assert agreement.holds
        assert edge.traffic.fell_back == 0
        edge.close()
