"""A bundle answers every test image as torch does, in batches and one by one."""

import os
from pathlib import Path

import pytest
import torch

import offramp
from offramp.inference.agreement import compare_with_all_exits
from offramp.results import AdaptiveResult
from offramp.training.run import load_batches

RUNS = Path(__file__).parents[2] / "benchmarks" / "runs"
LOGIT_TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["emnist-convnet", "cifar10-resnet"])
def compared(request, tmp_path_factory):
    """A committed run, a session of its bundle, and all test images."""
    if "OFFRAMP_DATA" not in os.environ:
        pytest.skip("OFFRAMP_DATA is not set")
    run = offramp.load(RUNS / request.param)
    batches, _, _ = load_batches(run.require_recipe(), "test")
    inputs, _ = batches.__getitems__(range(len(batches)))
    folder = tmp_path_factory.mktemp("bundles") / request.param
    bundle = offramp.export(run.network, run.policy, folder, inputs[:256], plain=False)
    return run, offramp.Session(bundle), inputs


def joined(results) -> AdaptiveResult:
    parts = {
        name: torch.cat([torch.as_tensor(getattr(result, name)) for result in results])
        for name in ("output", "exit_index", "confidence", "macs")
    }
    return AdaptiveResult(**parts)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_session_and_runner_agree_on_all_test_images(compared, batch_size):
    run, session, inputs = compared
    assert len(inputs) >= 10_000
    answers = joined([session.run(batch) for batch in inputs.split(batch_size)])
    agreement = compare_with_all_exits(answers, run.network, run.policy, inputs)
    print(f"batch {batch_size}: {agreement}")
    assert agreement.holds
    assert max(agreement.differences) < LOGIT_TOLERANCE
