import pytest

from offramp.errors import InvalidArgumentError
from offramp.offload.plan import CallCost, LinkTerms, best_cut, plan_split

ASKED = {
    "exits": (0, 2),
    "edge_ms": (10.0, 30.0),
    "cloud_ms": (1.0, 3.0),
    "leaving": (0.75, 0.25),
    "calls": (CallCost(call_bytes=5000, call_ms=1), CallCost(call_bytes=1000, call_ms=2)),
    "link": LinkTerms(mbit=8, rtt_ms=20),
    "codec": "int8",
}


def test_every_cut_by_hand():
    cloud, split, edge = plan_split(**ASKED)
    # All cross: 1 + 20 + 5 ms, then 1 ms, or 4 for a quarter of them.
    assert cloud.mean_ms == pytest.approx(26 + 0.75 * 1 + 0.25 * 4)
    assert (cloud.split_after, cloud.p95_ms, cloud.bytes_per_request) == (-1, 30.0, 5000)
    # A quarter crosses: 10 + 2 + 20 + 1 + 3 ms.
    assert split.mean_ms == pytest.approx(0.75 * 10 + 0.25 * 36)
    assert (split.edge_ms, split.link_ms, split.cloud_ms) == pytest.approx((10, 5.75, 0.75))
    assert (split.split_after, split.p95_ms, split.bytes_per_request) == (0, 36.0, 250)
    assert edge.mean_ms == pytest.approx(0.75 * 10 + 0.25 * 40)
    assert (edge.split_after, edge.codec, edge.bytes_per_request) == (2, None, 0)
    assert best_cut([cloud, split, edge]) is split


def test_p95_is_reached_by_95_percent():
    rare = plan_split(**{**ASKED, "leaving": (0.95, 0.05)})
    assert rare[1].p95_ms == 10.0
    less_rare = plan_split(**{**ASKED, "leaving": (0.94, 0.06)})
    assert less_rare[1].p95_ms == 36.0


def test_a_faster_link_never_costs_more():
    slow = plan_split(**ASKED)
    fast = plan_split(**{**ASKED, "link": LinkTerms(mbit=80, rtt_ms=2)})
    assert all(f.mean_ms <= s.mean_ms for f, s in zip(fast, slow, strict=True))


@pytest.mark.parametrize(
    "wrong", [{"leaving": (0.5, 0.4)}, {"leaving": (1.5, -0.5)}, {"edge_ms": (1.0,)}]
)
def test_numbers_that_do_not_fit_are_refused(wrong):
    with pytest.raises(InvalidArgumentError):
        plan_split(**{**ASKED, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [{"mbit": 0, "rtt_ms": 1}, {"mbit": 1, "rtt_ms": -1}, {"mbit": float("nan"), "rtt_ms": 0}],
)
def test_links_that_cannot_be_are_refused(wrong):
    with pytest.raises(InvalidArgumentError, match="Mbit/s"):
        LinkTerms(**wrong)
