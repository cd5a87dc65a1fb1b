from dataclasses import replace

import numpy as np
import pytest

from offramp.errors import ArtifactError, InvalidArgumentError, PayloadError
from offramp.offload.codec import CODECS, channel_scales, decode, encode, find_codec
from offramp.runtime.bundle import Step
from offramp.runtime.files import TensorSpec


def step(scales=((0.5, 2.0), ())):
    """A step that is given a map of two channels, a mask and a float that the policy remembers."""
    return Step(
        file="step_1.onnx",
        sha256="",
        exit_index=1,
        temperature=1.0,
        threshold=0.5,
        features=(
            TensorSpec(name="map", dtype="float32", sample_shape=(2, 1, 2)),
            TensorSpec(name="mask", dtype="int64", sample_shape=(2,)),
        ),
        state=(TensorSpec(name="score", dtype="float32", sample_shape=()),),
        stage_macs=0,
        head_macs=0,
        exit_macs=0,
        payload_bytes=0,
        parameter_bytes=0,
        channel_scales=scales,
    )


MAP = np.array([[[[0.2, -70.0]], [[2.9, 254.0]]]], dtype=np.float32)
CARRIED = [MAP, np.array([[1, 0]]), np.array([0.1], dtype=np.float32)]


def test_float32_is_exact():
    there = encode(CARRIED, step(), find_codec("float32"))
    back = decode(there, step())
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(CARRIED, back, strict=True))


def test_int8_rounds_to_steps_of_the_channel_and_cuts_off():
    there = encode(CARRIED, step(), find_codec("int8"))
    assert there[0].dtype == np.int8
    assert there[0].tolist() == [[[[0, -127]], [[1, 127]]]]
    back = decode(there, step())
    assert back[0].tolist() == [[[[0.0, -63.5]], [[2.0, 254.0]]]]
    assert back[0].dtype == np.float32


def test_only_float_features_change():
    for codec in CODECS.values():
        there = encode(CARRIED, step(), codec)
        assert there[1].dtype == np.int64
        assert there[2].tolist() == [np.float32(0.1)]


def test_float16_keeps_large_values_finite():
    large = [np.full((1, 2, 1, 2), 1e6, dtype=np.float32), *CARRIED[1:]]
    there = encode(large, step(), find_codec("float16"))
    assert there[0].dtype == np.float16
    assert np.isfinite(there[0]).all()
    assert decode(there, step())[0].dtype == np.float32


def test_scales_are_per_channel_of_maps_and_of_tokens():
    maps = np.zeros((3, 2, 4, 4), dtype=np.float32)
    maps[1, 0, 2, 2], maps[2, 1, 0, 0] = -127.0, 12.7
    assert channel_scales(maps) == pytest.approx((1.0, 0.1))
    assert channel_scales(maps.transpose(0, 2, 3, 1).reshape(3, 16, 2)) == pytest.approx((1.0, 0.1))


def test_an_unknown_codec_is_refused():
    with pytest.raises(InvalidArgumentError, match="one of float32, float16, int8"):
        find_codec("jpeg")


def test_a_bundle_without_scales_says_what_to_do():
    with pytest.raises(ArtifactError, match="Export the run again"):
        encode(CARRIED, replace(step(), channel_scales=None), find_codec("int8"))


def test_other_types_are_refused():
    with pytest.raises(PayloadError, match="mask as int64"):
        decode([CARRIED[0], CARRIED[1].astype(np.int8), CARRIED[2]], step())
    with pytest.raises(PayloadError, match="map as float32, float16, int8"):
        decode([CARRIED[0].astype(np.float64), *CARRIED[1:]], step())
    for shape in ((1, 1, 1, 2), (1, 3, 1, 2), (1, 2)):
        with pytest.raises(PayloadError, match="map of shape"):
            decode([np.zeros(shape, dtype=np.int8), *CARRIED[1:]], step())
    with pytest.raises(PayloadError, match="no scales"):
        decode([MAP.astype(np.int8), *CARRIED[1:]], step(None))
    with pytest.raises(PayloadError, match="3 tensors"):
        decode(CARRIED[:2], step())


@pytest.mark.parametrize("sample_shape", [(7,), (5, 7), (7, 4, 5)])
def test_every_kind_of_feature_comes_back_within_half_a_step(sample_shape):
    features = np.random.default_rng(0).standard_normal((3, *sample_shape)).astype(np.float32)
    scales = channel_scales(features)
    assert len(scales) == 7
    spec = TensorSpec(name="x", dtype="float32", sample_shape=sample_shape)
    one = replace(step(), features=(spec,), state=(), channel_scales=(scales,))
    (back,) = decode(encode([features], one, find_codec("int8")), one)
    assert back.shape == features.shape
    assert np.abs(back - features).max() <= 0.5001 * max(scales)
