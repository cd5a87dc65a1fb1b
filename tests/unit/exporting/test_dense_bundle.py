from functools import partial

import numpy as np
import pytest
import torch
from small_dense import X, make_network, make_policy, write_bundle

from offramp import AdaptiveRunner, Session, ShapeError
from offramp.calibration.collect import collect, collect_from_session
from offramp.errors import InvalidArgumentError
from offramp.exporting.quantize import quantize
from offramp.measure.dense import label_maps
from offramp.runtime import PlainSession


@pytest.fixture(scope="module")
def bundle_of(shared):
    return lambda kind: shared(f"dense {kind}", partial(write_bundle, kind))


@pytest.fixture(scope="module")
def network():
    return make_network("share")


@pytest.fixture(scope="module")
def policy():
    return make_policy("share")


@pytest.fixture(scope="module")
def session(bundle_of):
    return Session(bundle_of("share"), threads=1)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("size", [(20, 24), (32, 32), (44, 28)])
def test_images_of_any_size_are_answered_as_torch_answers(network, policy, session, size, batch):
    images = torch.randn(batch, 3, *size)
    found, expected = session.run(images.numpy()), AdaptiveRunner(network, policy).run(images)
    assert found.exit_index.tolist() == expected.exit_index.tolist()
    np.testing.assert_allclose(found.output, expected.output.numpy(), atol=1e-4)
    np.testing.assert_allclose(found.confidence, expected.confidence.numpy(), atol=1e-4)
    assert found.macs.tolist() == expected.macs.tolist()
    plain = PlainSession(session.bundle).run(images.numpy())
    np.testing.assert_allclose(plain, network(images)[-1].detach().numpy(), atol=1e-4)


def test_both_ways_out_were_taken(session):
    assert set(session.run(X.numpy()).exit_index) == {0, 2}


def test_labels_come_as_bytes_of_the_images_size(session):
    found = session.label_maps(X.numpy())
    assert found.output.dtype == np.uint8
    output = torch.from_numpy(session.run(X.numpy()).output)
    np.testing.assert_array_equal(found.output, label_maps(output, (20, 24)).numpy())


@pytest.mark.parametrize("shape", [(1, 3, 21, 24), (1, 3, 20, 0), (1, 1, 20, 24), (1, 3, 20)])
def test_sizes_that_the_strides_do_not_allow_are_refused(session, shape):
    with pytest.raises(ShapeError, match=r"\(B, 3, H, W\), B at least 1, H and W multiples of 4"):
        session.run(np.zeros(shape, dtype=np.float32))


def test_a_deadline_is_kept_step_by_step(session):
    with pytest.raises(InvalidArgumentError, match="call time_steps"):
        Session(session.bundle).run(X.numpy(), deadline_ms=5)
    assert len(session.time_steps(X.numpy())) == 2
    session.step_ms = (1.0, 1e6)
    assert set(session.run(X.numpy(), deadline_ms=100).exit_index) == {0}
    assert set(session.run(X[:1].numpy(), deadline_ms=100).exit_index) == {0}
    session.step_ms = (1.0, 1.0)
    expected = session.run(X.numpy()).exit_index
    assert session.run(X.numpy(), deadline_ms=1e5).exit_index.tolist() == expected.tolist()


def test_a_bundle_says_what_its_network_says(network, session):
    masks = torch.randint(4, (6, 20, 24))
    of_bundle = collect_from_session(session, [(X, masks)])
    of_network = collect(network, [(X, masks)])
    assert of_bundle.numbers == (0, 2)
    assert torch.equal(of_bundle.confusion_KNCC, of_network.confusion_KNCC[[0, 2]])


def test_agreement_hands_its_memory_on(bundle_of):
    session = Session(bundle_of("agreement"))
    runner = AdaptiveRunner(make_network("agreement"), make_policy("agreement"))
    for images in (X, X[:1]):
        expected = runner.run(images)
        found = session.run(images.numpy())
        assert found.exit_index.tolist() == expected.exit_index.tolist()
        np.testing.assert_allclose(found.confidence, expected.confidence.numpy(), atol=1e-5)


def test_int8_is_refused(session, tmp_path):
    with pytest.raises(InvalidArgumentError, match="a class for every pixel: run it in float32"):
        quantize(session.bundle, tmp_path / "int8", X.numpy())
    assert not (tmp_path / "int8").exists()
