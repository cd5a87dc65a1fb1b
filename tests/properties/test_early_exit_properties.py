"""What must hold for every network, batch and policy.

Results of different batch sizes agree except where a confidence lies within 1e-4 of its
threshold (rule 7 of the design): such samples are left out where batches differ.
"""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.families.exits import AdaptiveRunner
from offramp.measure.cost import counting_macs
from offramp.policy.confidence import CONFIDENCE_RULES
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy, always_leave_at, never_leave
from offramp.zoo.mlp import mlp

INF = math.inf
NEAR = 1e-4

rules = st.sampled_from(sorted(CONFIDENCE_RULES))
one_threshold = st.floats(0, 1) | st.just(INF)


@st.composite
def networks(draw):
    """A small random network whose heads are sure of some samples."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    widths = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    network = mlp(in_features=3, widths=widths, num_classes=draw(st.integers(2, 5))).eval()
    with torch.no_grad():
        for head in network.exits:
            head.weight.mul_(8)
    return network


@st.composite
def batches(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return 2 * torch.randn(draw(st.integers(1, 12)), 3)


@st.composite
def cases(draw):
    """A network, a batch, and thresholds with their rule."""
    network = draw(networks())
    count = network.num_exits - 1
    thresholds = draw(st.lists(one_threshold, min_size=count, max_size=count))
    return network, draw(batches()), ThresholdPolicy(tuple(thresholds), rule=draw(rules))


@torch.no_grad()
def is_near(network, x, policy):
    """Whether some exit's confidence lies near its threshold, sample by sample."""
    near = torch.zeros(len(x), dtype=torch.bool)
    for threshold, logits in zip(policy.thresholds, network(x), strict=False):
        near |= (CONFIDENCE_RULES[policy.rule](logits) - threshold).abs() < NEAR
    return near


def close(left, right) -> bool:
    return torch.allclose(left, right, rtol=1e-4, atol=1e-4)


@given(networks(), batches())
@torch.no_grad()
def test_never_leaving_equals_the_final_exit(network, x):
    result = AdaptiveRunner(network, never_leave(network.num_exits)).run(x)
    assert (result.exit_index == network.num_exits - 1).all()
    assert close(result.output, network.plain()(x))
    assert (result.macs == network.costs(x).plain_macs).all()


@given(networks(), batches(), rules)
@torch.no_grad()
def test_leaving_at_once_equals_the_first_head(network, x, rule):
    for policy in (
        always_leave_at(0, num_exits=network.num_exits),
        ThresholdPolicy((0.0,) * (network.num_exits - 1), rule=rule),
    ):
        result = AdaptiveRunner(network, policy).run(x)
        assert (result.exit_index == 0).all()
        assert close(result.output, network(x)[0])


@given(cases())
@torch.no_grad()
def test_every_answer_is_the_head_it_left_by(case):
    network, x, policy = case
    result = AdaptiveRunner(network, policy).run(x)
    every_exit = torch.stack(network(x))
    assert close(result.output, every_exit[result.exit_index, torch.arange(len(x))])


@given(cases())
def test_result_does_not_depend_on_the_batch(case):
    network, x, policy = case
    runner = AdaptiveRunner(network, policy)
    whole = runner.run(x)
    flipped = runner.run(x.flip(0))
    singles = [runner.run(row[None]) for row in x]
    for n, near in enumerate(is_near(network, x, policy).tolist()):
        if near:
            continue
        for other, row in ((singles[n], 0), (flipped, len(x) - 1 - n)):
            assert other.exit_index[row] == whole.exit_index[n]
            assert other.macs[row] == whole.macs[n]
            assert close(other.output[row], whole.output[n])
            assert close(other.confidence[row], whole.confidence[n])


@given(cases(), st.integers(1, 4))
def test_patience_does_not_depend_on_the_batch(case, patience):
    network, x, _ = case
    runner = AdaptiveRunner(network, PatiencePolicy(patience + 1, network.num_exits))
    whole = runner.run(x)
    top = torch.stack(network(x)).detach().topk(2, dim=-1).values
    is_tied = (top[..., 0] - top[..., 1] < NEAR).any(0)
    for n, tied in enumerate(is_tied.tolist()):
        assert tied or runner.run(x[n : n + 1]).exit_index == whole.exit_index[n]


@given(cases(), st.data())
def test_raising_a_threshold_never_makes_a_sample_leave_earlier(case, data):
    network, x, policy = case
    raised = tuple(
        data.draw(st.floats(t, 1) | st.just(INF)) if t < INF else INF for t in policy.thresholds
    )
    stricter = ThresholdPolicy(raised, rule=policy.rule)
    before = AdaptiveRunner(network, policy).run(x).exit_index
    after = AdaptiveRunner(network, stricter).run(x).exit_index
    settled = ~(is_near(network, x, policy) | is_near(network, x, stricter))
    assert (after >= before)[settled].all()


@given(cases())
def test_macs_are_exactly_those_that_ran(case):
    network, x, policy = case
    runner = AdaptiveRunner(network, policy)
    runner.run(x[:1])  # counts the costs, which runs every part once
    with counting_macs() as counted:
        result = runner.run(x)
    assert int(result.macs.sum()) == counted()


@given(cases())
def test_confidence_is_that_of_the_answer(case):
    network, x, policy = case
    result = AdaptiveRunner(network, policy).run(x)
    assert close(result.confidence, CONFIDENCE_RULES[policy.rule](result.output))
    left = result.exit_index < network.num_exits - 1
    thresholds = torch.tensor([*policy.thresholds, -INF])[result.exit_index]
    assert (result.confidence >= thresholds)[left].all()
