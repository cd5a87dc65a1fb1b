"""What is timed, and on what; how long it takes is no test's business."""

import pytest
import torch

import offramp.evaluation.profiling as profiling_module
from offramp.errors import InvalidArgumentError
from offramp.evaluation.profiling import profile_network, profile_sizes, time_parts, torch_parts
from offramp.exporting.profiling import as_in_a_bundle, profile_exported
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy
from offramp.zoo.mlp import mlp

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
POLICY = ThresholdPolicy((0.5, 0.5))


@pytest.fixture
def network():
    return mlp(in_features=6, widths=(5, 8, 7), num_classes=4).eval()


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(profiling_module, "_SECONDS", 0.01)


def test_sizes_shrink_from_the_batch_to_one():
    assert profile_sizes(1, num_samples=40) == (1,)
    assert profile_sizes(16, num_samples=40) == (1, 4, 16)
    assert profile_sizes(40, num_samples=40) == (1, 4, 16, 40)
    for size in (0, 41):
        with pytest.raises(InvalidArgumentError, match=rf"in \[1, 40\].* Got {size}"):
            profile_sizes(size, num_samples=40)


def test_parts_run_in_the_order_of_the_network(network):
    names = [name for name, _ in torch_parts(network, POLICY, X[:4])]
    assert names == [
        *("stage_0", "exit_0", "compaction_0"),
        *("stage_1", "exit_1", "compaction_1"),
        *("stage_2", "exit_2"),
    ]
    assert not [n for n, _ in torch_parts(network, POLICY, X[:1]) if n.startswith("compaction")]


def test_stages_are_given_what_the_stages_before_made(network):
    parts = dict(torch_parts(network, POLICY, X[:4]))
    expected = (X[:4],)
    for k in range(3):
        expected = network.run_stage(k, expected)
        torch.testing.assert_close(parts[f"stage_{k}"](), expected)


def test_time_is_put_down_to_the_part_that_took_it(monkeypatch):
    clock = iter([0.0, *(x for lap in range(40) for x in (0, 1, 1, 4))])
    now = [0.0]

    def tick():
        now[0] += next(clock)
        return now[0]

    monkeypatch.setattr(profiling_module.time, "perf_counter", tick)
    monkeypatch.setattr(profiling_module, "_SECONDS", 0.0)
    ms = time_parts([("a", lambda: None), ("b", lambda: None)])
    assert set(ms) == {"a", "b"}
    assert ms["b"] > ms["a"] > 0


@pytest.mark.parametrize("profile", [profile_network, profile_exported])
@pytest.mark.parametrize("policy", [POLICY, PatiencePolicy(2, 3)], ids=["thresholds", "patience"])
def test_a_profile_has_every_part_at_every_size(network, profile, policy):
    found = profile(network, policy, X, batch_size=5)
    assert found.sizes == (1, 4, 5)
    for times in (found.stage_ms, found.exit_ms, found.compaction_ms):
        assert [len(part) for part in times] == [3, 3, 3]
        assert min(min(part) for part in times) >= 0
    assert all(ms > 0 for ms in found.exit_ms[2])
    assert found.versions
    assert [part[0] for part in found.compaction_ms] == [0, 0, 0]
    assert found.compaction_ms[2] == (0, 0, 0)
    assert found.compaction_ms[0][2] > 0


MS = {
    "stage_0": 5.0,
    "handover_0": 2.0,
    "exit_0": 3.0,
    "stage_1": 7.0,
    "handover_1": 1.5,
    "exit_1": 2.5,
    "least_call": 1.0,
}


def test_handing_on_counts_to_the_exit_that_ends_a_call():
    assert as_in_a_bundle(MS, 2, one_graph=False) == MS | {
        "stage_0": 3.0,
        "exit_0": 3.0 - 1.0 + 2.0,
        "stage_1": 5.5,
        "exit_1": 2.5,
    }


def test_in_one_graph_an_exit_makes_no_call():
    assert as_in_a_bundle(MS, 2, one_graph=True) == MS | {
        "stage_0": 3.0,
        "exit_0": 3.0 - 1.0,
        "stage_1": 5.5,
        "exit_1": 2.5,
    }
    # Where calls take all the time, an exit costs nothing, and the plain network a call.
    calls = dict.fromkeys(MS, 1.0)
    found = as_in_a_bundle(calls, 2, one_graph=True)
    assert [found[name] for name in ("stage_0", "exit_0", "stage_1", "exit_1")] == [0, 0, 0, 1]
