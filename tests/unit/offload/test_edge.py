import time
from dataclasses import replace

import numpy as np
import pytest

from offramp.errors import (
    ArtifactError,
    AuthenticationError,
    InvalidArgumentError,
    LinkTimeoutError,
    OffloadError,
    PayloadError,
    ShapeError,
)
from offramp.offload.cloud import cloud_models, middle_model
from offramp.offload.codec import CODECS
from offramp.offload.edge import EdgeConfig, EdgeRunner
from offramp.offload.link import InProcessLink, Reply
from offramp.offload.naming import identity
from offramp.runtime import Session, read_bundle, with_thresholds
from offramp.runtime.part import PartSession


def links(bundle):
    """A link to what is behind each cut."""
    session = PartSession(bundle, threads=1)
    return {
        int(model.metadata["starts_after"]): InProcessLink(model)
        for model in cloud_models(session, "small")
    }


class FaultyLink:
    """A link that fails as told, then goes on as another."""

    def __init__(self, link, faults):
        self.link, self.faults, self.calls, self.is_back = link, list(faults), 0, True

    def send(self, inputs, *, timeout_s, compresses=False):
        self.calls += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        reply = self.link.send(inputs, timeout_s=timeout_s, compresses=compresses)
        return reply if fault is None else fault(reply)

    def check(self, *, timeout_s):
        if not self.is_back:
            raise OffloadError("gone")

    def close(self):
        pass


def changed(**outputs):
    """A fault: the answer comes, but some of it is wrong."""
    return lambda reply: Reply(
        outputs={**reply.outputs, **outputs},
        sent_bytes=reply.sent_bytes,
        received_bytes=reply.received_bytes,
    )


def assert_same(result, whole):
    np.testing.assert_allclose(result.output, whole.output, atol=1e-5)
    np.testing.assert_array_equal(result.exit_index, whole.exit_index)
    np.testing.assert_allclose(result.confidence, whole.confidence, atol=1e-5)
    np.testing.assert_array_equal(result.macs, whole.macs)


@pytest.mark.parametrize("split_after", [-1, 0, 1, 2])
def test_every_cut_answers_as_the_whole(bundle, whole, split_after, images):
    edge = EdgeRunner(bundle, split_after=split_after, link=links(bundle)[split_after], threads=1)
    result = edge.run(images)
    assert_same(result, whole)
    np.testing.assert_array_equal(result.answered_by, whole.exit_index > split_after)
    assert not result.fell_back.any()
    assert edge.traffic.offloaded == (whole.exit_index > split_after).sum()


@pytest.mark.parametrize("split_after", [0, 1, 2])
def test_what_a_policy_remembers_crosses_too(patient_folder, split_after, images):
    bundle = read_bundle(patient_folder)
    whole = Session(bundle, threads=1).run(images)
    assert len(set(whole.exit_index.tolist())) > 1
    edge = EdgeRunner(bundle, split_after=split_after, link=links(bundle)[split_after], threads=1)
    assert_same(edge.run(images), whole)


def test_three_machines_in_a_row(bundle, whole, images):
    middle = EdgeRunner(bundle, starts_after=0, split_after=1, link=links(bundle)[1], threads=1)
    link = InProcessLink(middle_model(middle, "small"))
    result = EdgeRunner(bundle, split_after=0, link=link, threads=1).run(images)
    assert_same(result, whole)
    np.testing.assert_array_equal(result.answered_by, np.clip(whole.exit_index, 0, 2))


@pytest.mark.parametrize("codec", list(CODECS))
def test_codecs_change_few_answers(bundle, whole, codec, images):
    config = EdgeConfig(codec=codec)
    result = EdgeRunner(bundle, split_after=0, link=links(bundle)[0], config=config).run(images)
    same_exit = result.exit_index == whole.exit_index
    assert same_exit.mean() > 0.95
    assert np.abs(result.output - whole.output)[same_exit].max() < 0.05
    assert (result.output.argmax(1) == whole.output.argmax(1)).mean() > 0.95


def test_bytes_on_the_link_are_those_of_the_survivors(bundle, whole, images):
    survivors = int((whole.exit_index > 0).sum())
    sent = {}
    for codec in ("float32", "int8"):
        edge = EdgeRunner(
            bundle, split_after=0, link=links(bundle)[0], config=EdgeConfig(codec=codec)
        )
        edge.run(images)
        sent[codec] = edge.traffic.sent_bytes
    assert sent["float32"] == survivors * bundle.steps[0].payload_bytes
    assert sent["int8"] * 4 == sent["float32"]


@pytest.mark.parametrize(
    "fault",
    [
        OffloadError("gone"),
        LinkTimeoutError("slow"),
        AuthenticationError("who are you"),
        PayloadError("garbage"),
        ValueError("a bug in the link"),
        changed(exit_index=np.zeros(3, dtype=np.int64)),
        changed(output=np.zeros((1, 4), dtype=np.float32)),
        changed(confidence=None),
    ],
)
def test_a_link_of_no_use_leaves_the_best_local_answer(bundle, whole, fault, images):
    link = FaultyLink(links(bundle)[1], [fault])
    edge = EdgeRunner(bundle, split_after=1, link=link, config=EdgeConfig(retries=0))
    result = edge.run(images)
    is_unsure = whole.exit_index > 1
    np.testing.assert_array_equal(result.fell_back, is_unsure)
    assert set(result.exit_index[is_unsure]) == {1}
    np.testing.assert_array_equal(result.exit_index[~is_unsure], whole.exit_index[~is_unsure])
    assert (result.answered_by == 0).all()
    assert isinstance(fault, ValueError) or edge.traffic.failed_calls == 1
    assert not edge.run(images).fell_back.any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exit_index", 1),
        ("exit_index", 4),
        ("output", np.inf),
        ("confidence", 1.5),
        ("confidence", np.nan),
        ("answered_by", -1),
    ],
)
def test_answers_that_cannot_be_are_not_believed(bundle, whole, name, value, images):
    def wrong(reply):
        return changed(**{name: np.full_like(reply.outputs[name], value)})(reply)

    link = FaultyLink(links(bundle)[1], [wrong])
    edge = EdgeRunner(bundle, split_after=1, link=link, config=EdgeConfig(retries=0))
    np.testing.assert_array_equal(edge.run(images).fell_back, whole.exit_index > 1)


def test_one_answer_that_cannot_be_spoils_no_other(bundle, whole, images):
    def wrong(reply):
        output = reply.outputs["output"].copy()
        output[0, 0] = np.nan
        return changed(output=output)(reply)

    edge = EdgeRunner(bundle, split_after=1, link=FaultyLink(links(bundle)[1], [wrong]))
    result = edge.run(images)
    (fell,) = np.flatnonzero(result.fell_back)
    assert fell == np.flatnonzero(whole.exit_index > 1)[0]
    assert result.exit_index[fell] == 1
    kept = np.arange(len(images)) != fell
    np.testing.assert_array_equal(result.exit_index[kept], whole.exit_index[kept])


def test_a_sample_that_overflows_is_not_sent_and_spoils_no_other(bundle, whole, images):
    spoilt = images.copy()
    row = np.flatnonzero(whole.exit_index > 1)[0]
    spoilt[row] = np.nan
    edge = EdgeRunner(bundle, split_after=0, link=links(bundle)[0])
    result = edge.run(spoilt)
    assert np.flatnonzero(result.fell_back).tolist() == [row]
    assert edge.traffic.failed_calls == 0


def test_large_batches_are_sent_in_parts(bundle, whole, images):
    link = FaultyLink(links(bundle)[0], [])
    edge = EdgeRunner(bundle, split_after=0, link=link)
    result = edge.run(np.concatenate([images] * 10))
    survivors = 10 * int((whole.exit_index > 0).sum())
    assert link.calls == -(-survivors // 256)
    np.testing.assert_array_equal(result.exit_index, np.tile(whole.exit_index, 10))
    assert not result.fell_back.any()


def test_a_deadline_that_is_over_is_no_failure_of_the_link(bundle, images):
    link = FaultyLink(links(bundle)[1], [])
    edge = EdgeRunner(bundle, split_after=1, link=link)
    for _ in range(5):
        assert edge.run(images, deadline_ms=1e-3).fell_back.any()
    assert link.calls == edge.traffic.failed_calls == 0
    assert not edge.run(images).fell_back.any()


@pytest.mark.parametrize("deadline_ms", [0, -1, float("nan"), float("inf"), 1e9])
def test_deadlines_that_are_none_are_refused(bundle, images, deadline_ms):
    edge = EdgeRunner(bundle, split_after=1, link=links(bundle)[1])
    with pytest.raises(InvalidArgumentError, match="'deadline_ms'"):
        edge.run(images, deadline_ms=deadline_ms)


def test_int8_without_scales_is_refused_at_once(bundle):
    steps = tuple(replace(step, channel_scales=None) for step in bundle.steps)
    older = replace(bundle, steps=steps)
    config = EdgeConfig(codec="int8")
    with pytest.raises(ArtifactError, match="Export the run again"):
        EdgeRunner(older, split_after=1, link=links(bundle)[1], config=config)


def test_a_call_that_failed_at_once_is_tried_again(bundle, whole, images):
    link = FaultyLink(links(bundle)[1], [OffloadError("reset"), OffloadError("reset")])
    config = EdgeConfig(retries=2, deadline_ms=20_000)
    edge = EdgeRunner(bundle, split_after=1, link=link, config=config)
    assert_same(edge.run(images), whole)
    assert (edge.traffic.calls, edge.traffic.failed_calls) == (3, 2)


def test_nothing_is_tried_again_that_cannot_make_it(bundle, images):
    link = FaultyLink(links(bundle)[1], [OffloadError("reset")])
    edge = EdgeRunner(bundle, split_after=1, link=link, config=EdgeConfig(deadline_ms=5000))
    edge._usual_s = 10.0
    assert edge.run(images).fell_back.any()
    assert link.calls == 1


def test_a_dead_link_is_left_alone_until_it_is_back(bundle, whole, images):
    config = EdgeConfig(retries=0, failures=2, probe_s=0.01)
    link = FaultyLink(links(bundle)[1], [OffloadError("gone")] * 2)
    link.is_back = False
    edge = EdgeRunner(bundle, split_after=1, link=link, config=config)
    assert all(edge.run(images).fell_back.any() for _ in range(5))
    assert link.calls == 2
    link.is_back = True
    end = time.perf_counter() + 5
    while edge.run(images).fell_back.any():
        assert time.perf_counter() < end
    assert_same(edge.run(images), whole)
    edge.close()


def test_without_anything_here_there_is_no_answer_without_the_link(bundle, images):
    link = FaultyLink(links(bundle)[-1], [OffloadError("gone")])
    edge = EdgeRunner(bundle, split_after=-1, link=link, config=EdgeConfig(retries=0))
    with pytest.raises(OffloadError, match="gone"):
        edge.run(images)


def test_the_link_is_not_asked_when_nobody_is_unsure(bundle, whole, images):
    link = FaultyLink(links(bundle)[0], [])
    sure = images[whole.exit_index == 0]
    result = EdgeRunner(bundle, split_after=0, link=link).run(sure)
    assert link.calls == 0
    assert (result.answered_by == 0).all()


@pytest.mark.parametrize("split_after", [-2, 4, 3])
def test_cuts_that_are_none_are_refused(bundle, split_after):
    with pytest.raises(InvalidArgumentError, match="'split_after' parameter"):
        EdgeRunner(bundle, split_after=split_after, link=links(bundle)[0])


def test_wrong_inputs_are_refused(bundle, images):
    edge = EdgeRunner(bundle, split_after=0, link=links(bundle)[0])
    with pytest.raises(ShapeError, match=r"Expected inputs of shape \(B, 1, 12, 12\)"):
        edge.run(images[:, :, :6])


@pytest.mark.parametrize(
    "wrong",
    [
        {"codec": "jpeg"},
        {"deadline_ms": 0},
        {"deadline_ms": float("inf")},
        {"retries": -1},
        {"failures": 0},
        {"probe_s": 0},
        {"probe_s": float("inf")},
    ],
)
def test_senseless_configurations_are_refused(wrong):
    with pytest.raises(InvalidArgumentError):
        EdgeConfig(**wrong)


def test_bundles_that_differ_in_a_threshold_are_other_models(folder):

    bundle = read_bundle(folder)
    assert identity(bundle) == identity(read_bundle(folder))
    assert identity(bundle) != identity(with_thresholds(bundle, [0.9, 0.9, 0.9]))
