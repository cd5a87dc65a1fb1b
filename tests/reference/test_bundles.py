"""A bundle answers every test image as torch does, in batches and one by one."""

import os
from pathlib import Path

import pytest

import offramp
from offramp.families import reference_of
from offramp.families.agreement import answer_in_batches
from offramp.measure.agreement import compare
from offramp.runs.run import load_batches

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


@pytest.mark.data
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_session_and_runner_agree_on_all_test_images(compared, batch_size):
    run, session, inputs = compared
    assert len(inputs) >= 10_000
    answers = answer_in_batches(session, inputs, batch_size=batch_size)
    agreement = compare(answers, reference_of(run.network, run.policy, inputs))
    print(f"batch {batch_size}: {agreement}")
    assert agreement.holds
    assert max(agreement.differences) < LOGIT_TOLERANCE
