"""Networks that skip blocks or drop tokens answer every test image as computing all and masking.

Both engines, rule 7 of DESIGN: what lies within 1e-4 of the threshold may go the other way.
"""

import os
from pathlib import Path

import pytest
import torch

import offramp
from offramp.families import make_runner, reference_of
from offramp.families.agreement import answer_in_batches
from offramp.measure.agreement import compare
from offramp.runs.run import load_batches

RUNS = Path(__file__).parents[2] / "benchmarks" / "runs"
RUNS_INSIDE = ("emnist-skipnet", "emnist-avit")


@pytest.fixture(scope="module", params=RUNS_INSIDE)
def compared(request, tmp_path_factory):
    """A committed run in either engine, and all test images."""
    if "OFFRAMP_DATA" not in os.environ:
        pytest.skip("OFFRAMP_DATA is not set")
    if not (RUNS / request.param).is_dir():
        pytest.skip(f"{request.param} is not among the committed runs")
    run = offramp.load(RUNS / request.param)
    batches, _, _ = load_batches(run.require_recipe(), "test")
    inputs, _ = batches.__getitems__(range(len(batches)))
    runner = make_runner(run.network, run.policy)
    folder = tmp_path_factory.mktemp("bundles") / request.param
    bundle = offramp.export(run.network, runner.policy, folder, inputs[:256], plain=False)
    return request.param, {"torch": runner, "onnxruntime": offramp.Session(bundle)}, inputs


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_all_test_images_agree(compared, engine, batch_size):
    name, runners, inputs = compared
    network, policy = runners["torch"].network, runners["torch"].policy
    answers = answer_in_batches(runners[engine], inputs, batch_size=batch_size)
    agreements = []
    with torch.no_grad():
        for rows in torch.arange(len(inputs)).split(1000):
            some = _rows(answers, rows)
            agreements.append(compare(some, reference_of(network, policy, inputs[rows])))
    moved = sum(agreement.moved for agreement in agreements)
    worst = max(difference for a in agreements for difference in a.differences)
    print(f"{name}, {engine}, batch {batch_size}: {moved} of {len(inputs)} moved, {worst:.1e} off")
    assert len(inputs) >= 10_000
    assert moved <= len(inputs) / 1000
    assert sum(agreement.moved_far for agreement in agreements) == 0
    assert not any(agreement.differs for agreement in agreements)


def _rows(answers, rows):
    """The answers of some samples."""
    return offramp.AdaptiveResult(
        **{
            name: None if value is None else torch.as_tensor(value)[rows]
            for name, value in vars(answers).items()
        }
    )
