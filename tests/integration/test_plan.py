"""``offramp time BUNDLE --steps`` and ``offramp plan`` on the shared run."""

import json

import pytest
from PIL import Image

LINK = ("--mbit", "10", "--rtt-ms", "20")


@pytest.fixture
def bundle(exported_run):
    return exported_run / "bundle"


def test_the_plan_lists_every_cut_and_marks_the_best(bundle, figures_of, offramp, workplace):
    plan = figures_of("plan", bundle.parent, *LINK, "--threads", 1, "--edge-ms", 100)
    cuts = plan["cuts"]
    assert [cut["split_after"] for cut in cuts] == [-1, 0, 1, 2]
    assert [cut["codec"] for cut in cuts] == ["int8+zstd"] * 3 + [None]
    assert cuts[0]["offloaded_share"] == 1
    assert cuts[3]["bytes_per_request"] == cuts[3]["link_ms"] == cuts[3]["cloud_ms"] == 0
    for cut in cuts:
        parts = cut["edge_ms"] + cut["link_ms"] + cut["cloud_ms"]
        assert parts == pytest.approx(cut["mean_ms"])
    assert cuts[3]["edge_ms"] <= 100
    outcome = offramp("plan", bundle, *LINK, "--picture", workplace / "plan.png")
    assert outcome.code == 0, outcome.stderr
    assert "best: --split-after" in outcome.stdout
    with Image.open(workplace / "plan.png") as picture:
        assert picture.size == (720, 34 * 5)


def test_profiles_of_other_machines_take_the_place_of_this_one(bundle, offramp, figures_of):
    outcome = offramp("time", bundle, "--steps", "--threads", 1)
    assert outcome.code == 0, outcome.stderr
    path = bundle / "profile.json"
    content = json.loads(path.read_text())
    assert len(content["steps"]["step_ms"]) == 3
    content["steps"]["step_ms"] = [1000.0, 2000.0, 3000.0]
    path.write_text(json.dumps(content))
    plan = figures_of("plan", bundle, *LINK, "--edge-profile", path)
    assert plan["cuts"][3]["mean_ms"] > 1000
    assert plan["cuts"][3]["p95_ms"] in (1000, 3000, 6000)


def test_a_profile_of_another_network_is_refused(bundle, offramp):
    offramp("time", bundle, "--steps")
    path = bundle / "profile.json"
    content = json.loads(path.read_text())
    content["steps"]["weights_sha256"] = "0"
    path.write_text(json.dumps(content))
    outcome = offramp("plan", bundle, *LINK, "--cloud-profile", path)
    assert outcome.code == 2
    assert "another network" in outcome.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mbit", "0", "--rtt-ms", "1"), "Mbit/s"),
        ((*LINK, "--edge-ms", "0"), "--edge-ms"),
        ((*LINK, "--codec", "jpeg"), "codec"),
        ((*LINK, "--edge-profile", "missing.json"), "found none"),
    ],
)
def test_wrong_input_is_one_line(bundle, offramp, options, said):
    outcome = offramp("plan", bundle, *options)
    assert outcome.code == 2
    assert said in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
