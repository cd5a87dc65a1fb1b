import shutil
import threading
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from offramp.errors import ArtifactError, InvalidArgumentError, ShapeError
from offramp.exporting.bundle import export
from offramp.policy.policies import ThresholdPolicy
from offramp.runtime import PlainSession, Session, read_bundle, with_thresholds
from offramp.zoo.mlp import mlp

X = np.random.default_rng(0).standard_normal((300, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tiny_bundle):
    """A bundle of a tiny network with two exits, without the plain network."""
    return tiny_bundle


@pytest.fixture(scope="module")
def session(folder):
    return Session(folder, threads=1)


def test_result_is_numpy_in_the_order_of_the_batch(session):
    result = session.run(X)
    assert set(result.exit_index) == {0, 1}
    assert result.output.shape == (300, 4)
    assert result.output.dtype == result.confidence.dtype == np.float32
    assert result.macs.tolist() == [50 if k == 0 else 50 + 72 for k in result.exit_index]
    one_by_one = [session.run(x[None]).exit_index[0] for x in X[:50]]
    assert one_by_one == result.exit_index[:50].tolist()


def test_single_samples_follow_a_temperature_that_the_file_was_not_exported_with(folder):
    """onnxruntime would drop a division by the 1 that stands in the file."""
    bundle = read_bundle(folder)
    steps = tuple(replace(step, temperature=3.0) for step in bundle.steps)
    session = Session(replace(bundle, steps=steps), threads=1)
    together, alone = session.run(X[:20]), [session.run(x[None]) for x in X[:20]]
    assert [one.exit_index[0] for one in alone] == together.exit_index.tolist()
    confidences = [one.confidence[0] for one in alone]
    np.testing.assert_allclose(confidences, together.confidence, atol=1e-6)


def test_lists_and_float64_are_taken(session):
    found = session.run(X[:3].astype(np.float64).tolist())
    np.testing.assert_array_equal(found.output, session.run(X[:3]).output)


def test_answers_may_be_written_to_without_harm(session):
    first = session.run(X)
    expected = first.output.copy()
    first.output[:] = 0
    np.testing.assert_array_equal(session.run(X).output, expected)


def test_threads_may_share_a_session(session):
    expected = session.run(X).output
    found = {}

    def work(name):
        for _ in range(20):
            found[name] = session.run(X).output

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output in found.values():
        np.testing.assert_allclose(output, expected, atol=1e-6)
    assert len(found) == 4


@pytest.mark.parametrize(
    "inputs",
    [
        (X[:, :5],),
        (X[:0],),
        (X[0],),
        (np.float32(1),),
        (),
        (X, X),
    ],
    ids=["features", "no sample", "no batch axis", "scalar", "nothing", "too many"],
)
def test_inputs_of_another_shape_are_refused(session, inputs):
    with pytest.raises(ShapeError, match=r"Expected inputs of shape \(B, 6\), B at least 1. Got"):
        session.run(*inputs)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((255 * np.ones((2, 6))).astype(np.uint8), "Got uint8: scale it to floats"),
        (np.array([["a"] * 6]), "arrays of numbers.* of <U1"),
        ([[1.0] * 6, [1.0] * 5], "a list that makes none"),
        ({"input": X}, "a dict of object"),
        (None, "a NoneType of object"),
    ],
    ids=["bytes", "text", "ragged", "dict", "none"],
)
def test_inputs_that_are_no_floats_are_refused(session, given, says):
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        session.run(given)
    assert "\n" not in str(caught.value)


def test_tensors_that_need_gradients_are_run(session):
    tensor = torch.tensor(X).requires_grad_()
    assert np.array_equal(session.run(tensor).output, session.run(X).output)


def test_nan_goes_to_the_end(session):
    result = session.run(np.full((2, 6), np.nan))
    assert result.exit_index.tolist() == [1, 1]


def test_options_can_be_given(folder):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    found = Session(folder, options=options, providers=["CPUExecutionProvider"]).run(X)
    assert set(found.exit_index) == {0, 1}


def test_provider_that_is_not_there(folder):
    with pytest.raises(InvalidArgumentError, match=r"has no MagicProvider here. It has .*CPU"):
        Session(folder, providers=["MagicProvider"])


def test_no_threads(folder):
    with pytest.raises(InvalidArgumentError, match=r"'threads' .* at least 1. Got 0"):
        Session(folder, threads=0)


def test_bundle_without_a_plain_network(folder):
    with pytest.raises(ArtifactError, match="holds no plain network"):
        PlainSession(folder)


def single_answers(session):
    return [int(session.run(x[None]).exit_index[0]) for x in X[:30]]


def test_single_samples_follow_thresholds_set_anew(session):
    bundle = session.bundle
    for threshold, expected in ((0.0, {0}), (2.0, {1}), (float("inf"), {1})):
        assert set(single_answers(Session(with_thresholds(bundle, [threshold])))) == expected


def test_threads_may_race_for_the_first_single_sample(folder):
    session, found = Session(folder, threads=1), []
    expected = Session(folder, threads=1).run(X[:1]).output
    threads = [
        threading.Thread(target=lambda: found.append(session.run(X[:1]).output)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(np.array_equal(output, expected) for output in found)


def test_with_options_of_the_users_own_single_samples_go_step_by_step(folder, tmp_path):
    """So the file for single samples may be gone."""
    shutil.copytree(folder, tmp_path / "bundle")
    session = Session(tmp_path / "bundle", options=onnxruntime.SessionOptions())
    (tmp_path / "bundle" / "single.onnx").unlink()
    assert single_answers(session) == single_answers(Session(folder))


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_bundle_that_changes_under_a_session_is_noticed(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "bundle")
    session = Session(tmp_path / "bundle")
    path = tmp_path / "bundle" / "single.onnx"
    path.unlink() if change == "removed" else path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(
        ArtifactError, match=r"single\.onnx is not the file .* Open the bundle again"
    ):
        session.run(X[:1])
    assert len(session.run(X[:2]).output) == 2


def test_without_gates_there_are_no_blocks_to_run(session):
    with pytest.raises(InvalidArgumentError, match="family exits: it has no gates"):
        session.run_every_block(X)


def test_session_by_a_relative_path_outlives_a_change_of_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    session = Session(folder.name)
    bundle = read_bundle(folder.name)
    monkeypatch.chdir(tmp_path)
    assert session.run(X[:1]).exit_index.shape == (1,)  # loads the file for single samples
    assert bundle.folder == session.bundle.folder == folder
    assert Session(with_thresholds(bundle, [0.1])).run(X[:1]).exit_index.shape == (1,)


def test_exported_bundle_outlives_a_change_of_folder(monkeypatch, tmp_path):
    network = mlp(in_features=6, widths=(5, 8), num_classes=4).eval()
    monkeypatch.chdir(tmp_path)
    bundle = export(network, ThresholdPolicy((0.5,)), "bundle", torch.from_numpy(X))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert bundle.folder == tmp_path / "bundle"
    assert PlainSession(bundle).run(X[:2]).shape == (2, 4)
