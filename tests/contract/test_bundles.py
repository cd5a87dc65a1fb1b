"""The contract of every family's bundles; the toy of these tests has none."""

import json
import math
import urllib.request
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from served import serve_in_thread

from offramp.calibration.bundles import collect_steps, sweep_session
from offramp.calibration.collect import collect, collect_from_session
from offramp.calibration.evidence import calibrate
from offramp.calibration.thresholds import confidences
from offramp.errors import DataError, ExportMismatchError
from offramp.evaluation.evaluate import evaluate
from offramp.evaluation.processes import _all_steps, time_bundle
from offramp.evaluation.sweeping import collect_sweep
from offramp.exporting.bundle import check_parity
from offramp.families import reference_of
from offramp.families.agreement import answer_in_batches
from offramp.measure.agreement import compare
from offramp.runtime import PlainSession, Session, read_bundle
from offramp.serving import RunnerModel


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_a_session_answers_as_torch(exported, batch_size):
    example, bundle = exported
    session = Session(bundle, threads=1)
    found = answer_in_batches(session, example.inputs, batch_size=batch_size)
    agreement = compare(found, reference_of(example.network, example.policy, example.inputs))
    assert agreement.holds
    assert max(agreement.differences) < 1e-4
    expected = example.runner.run(example.inputs)
    alike = (found.work == expected.work).all(1)
    assert alike.sum() >= len(alike) - 1
    for name in ("output", "confidence", "macs", "exit_index"):
        theirs, ours = getattr(found, name)[alike], getattr(expected, name)[alike]
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_everything_in_a_session_answers_as_torch(exported):
    example, bundle = exported
    session = Session(bundle)
    theirs = _all_steps(session, example.inputs.numpy())
    assert compare(example.runner.run(example.inputs), theirs).holds
    assert compare(session.run(example.inputs), theirs).holds


def test_one_graph_and_the_steps_say_the_same_of_single_samples(exported):
    example, bundle = exported
    in_one, in_steps = (
        answer_in_batches(Session(way, threads=1), example.inputs, batch_size=1)
        for way in (bundle, replace(bundle, single_file=None, single_sha256=None))
    )
    assert torch.equal(in_one.work, in_steps.work)
    torch.testing.assert_close(in_one.output, in_steps.output, rtol=1e-5, atol=1e-5)


def test_a_bundle_is_read_as_it_was_written(exported):
    example, bundle = exported
    assert read_bundle(bundle.folder) == bundle
    assert bundle.family == example.family.name
    assert {path.name for path in bundle.folder.iterdir()} == {
        "bundle.json",
        *(file.name for file in bundle.files),
    }
    for file in bundle.files:
        assert b"site-packages" not in (bundle.folder / file.name).read_bytes()


def test_its_files_are_valid_onnx(exported):
    _, bundle = exported
    for file in bundle.files:
        model = onnx.load(bundle.folder / file.name)
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def test_the_plain_network_is_in_it(exported):
    example, bundle = exported
    with torch.no_grad():
        expected = example.network.plain()(example.inputs)
    np.testing.assert_allclose(PlainSession(bundle).run(example.inputs), expected, atol=1e-4)


def test_another_network_is_told_apart(exported):
    example, bundle = exported
    check_parity(Session(bundle), example.network, example.policy, example.inputs)
    with torch.no_grad():
        for parameter in example.network.parameters():
            parameter.add_(0.05)
    try:
        with pytest.raises(ExportMismatchError, match="of 40 samples went another way"):
            check_parity(Session(bundle), example.network, example.policy, example.inputs)
    finally:
        with torch.no_grad():
            for parameter in example.network.parameters():
                parameter.sub_(0.05)


def test_collecting_from_a_bundle_is_collecting_from_its_network(exported):
    example, bundle = exported
    found = collect_from_session(Session(bundle), example.batches)
    expected = collect(example.network, example.batches)
    torch.testing.assert_close(found.logits_KNC, expected.logits_KNC, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.labels_N, example.labels)
    assert found.costs.exit_macs() == expected.costs.exit_macs()
    with pytest.raises(DataError, match="at least one sample"):
        collect_from_session(Session(bundle), [])


def test_a_bundle_is_calibrated_as_its_network(exported):
    example, bundle = exported
    if example.family.thresholds is None:
        found, expected = (
            collect_steps(Session(bundle), example.batches),
            collect(example.network, example.batches),
        )
        rule = replace(example.policy, thresholds=(math.inf,) * (found.costs.num_exits - 1))
        assert found.decided_by == rule
        known_KN, asked_KN = (confidences(logits, rule) for logits in (found, expected))
        np.testing.assert_allclose(known_KN, asked_KN, atol=1e-5)
    else:
        found = sweep_session(Session(bundle), example.batches)
        expected, rule = collect_sweep(example.network, example.batches), None
        assert (found.thresholds, found.policy) == (expected.thresholds, expected.policy)
        np.testing.assert_allclose(found.mean_macs_K, expected.mean_macs_K, rtol=0.02)
    chosen = [calibrate(evidence, max_drop=0.4, rule=rule) for evidence in (found, expected)]
    assert chosen[0].mean_macs == pytest.approx(chosen[1].mean_macs, rel=0.02)


def test_a_bundle_is_evaluated_as_its_network(exported):
    example, bundle = exported
    found = evaluate(Session(bundle), example.batches)
    expected = evaluate(example.network, example.policy, example.batches)
    assert found.accuracy == pytest.approx(expected.accuracy, abs=1 / 40)
    assert found.mean_macs == pytest.approx(expected.mean_macs, rel=0.02)
    assert found.plain_macs == expected.plain_macs


def test_a_bundle_is_timed(exported):
    example, bundle = exported
    timing = time_bundle(Session(bundle), example.inputs, batch_sizes=(4,), rounds=2)
    (row,) = timing.results
    assert min(row.plain_ms, row.all_exits_ms, row.adaptive_ms, row.never_exit_ms) > 0
    assert (row.stage_ms is None) == (not bundle.steps)


def test_a_bundle_is_served(exported):
    example, bundle = exported
    session = Session(bundle, threads=1)
    model = RunnerModel(session, bundle, name="net")
    (spec,) = bundle.inputs
    few = example.inputs[:3]
    body = {
        "inputs": [
            {"name": spec.name, "shape": few.shape, "datatype": "FP32", "data": few.tolist()}
        ]
    }
    with serve_in_thread(model) as (http, _):
        url = f"http://{http}/v2/models/net/infer"
        request = urllib.request.Request(url, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=30) as response:
            outputs = {one["name"]: one["data"] for one in json.load(response)["outputs"]}
    expected = session.run(few)
    assert outputs["macs"] == expected.macs.tolist()
    np.testing.assert_allclose(outputs["output"], expected.output.reshape(-1), rtol=1e-5, atol=1e-6)
