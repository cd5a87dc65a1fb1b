"""Gate training against cases that can be worked out."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from offramp.errors import ShapeError
from offramp.training.tasks.reinforce import (
    hybrid_loss,
    reinforce_loss,
    returns_to_go,
    run_share,
    skip_rewards,
)

ALPHA = 0.6
FINAL = {(0, 0): -2.0, (0, 1): -0.5, (1, 0): -1.0, (1, 1): -0.1}
"""What the answer earns under each pair of actions."""


def test_skipping_earns_alpha_over_the_number_of_gates():
    action = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    rewards = skip_rewards(action, 0.8)
    assert rewards.tolist() == [
        pytest.approx([0, 0.2, 0.2, 0]),
        pytest.approx([0.2, 0.2, 0.2, 0.2]),
    ]


def test_skipping_a_dear_block_earns_more():
    rewards = skip_rewards(torch.zeros(1, 3), 1.0, weights=[1, 3, 4])
    assert rewards.tolist() == [pytest.approx([1 / 8, 3 / 8, 4 / 8])]


def test_return_to_go_holds_nothing_of_the_past():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    assert returns_to_go(rewards, torch.tensor([10.0])).tolist() == [[17.0, 16.0, 14.0]]


def exact_gradient(scores):
    """The gradient of the mean return over all four pairs of actions."""
    scores = scores.clone().requires_grad_()
    probabilities = scores.sigmoid()
    mean_return = torch.zeros(())
    for pair in itertools.product((0, 1), repeat=2):
        chance = torch.stack([p if a else 1 - p for p, a in zip(probabilities, pair, strict=True)])
        earned = FINAL[pair] + sum(ALPHA / 2 for a in pair if a == 0)
        mean_return = mean_return + chance.prod() * earned
    mean_return.backward()
    return scores.grad


def estimates(scores, *, baseline, num_batches=400, batch_size=50):
    """Gradients that drawn actions estimate, one a batch."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(num_batches):
        own = scores.clone().requires_grad_()
        probability = own.sigmoid().expand(batch_size, 2)
        action = torch.bernoulli(probability.detach(), generator=generator)
        final = torch.tensor([FINAL[tuple(row)] for row in action.int().tolist()])
        returned = returns_to_go(skip_rewards(action, ALPHA), final)
        reinforce_loss(probability, action, returned, baseline=baseline).backward()
        found.append(-own.grad)
    return torch.stack(found)


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_estimates_the_exact_gradient(baseline):
    scores = torch.tensor([0.4, -0.7])
    found = estimates(scores, baseline=baseline)
    standard_error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact_gradient(scores)).abs() < 4 * standard_error).all()
    assert (standard_error < 0.2 * exact_gradient(scores).abs().max()).all()


def test_a_baseline_cuts_the_variance():
    scores = torch.tensor([0.4, -0.7])
    without, with_it = (estimates(scores, baseline=b).var(0) for b in (False, True))
    assert (with_it < 0.6 * without).all()


def test_a_baseline_needs_somebody_to_compare_with():
    with pytest.raises(ShapeError, match="at least two samples"):
        reinforce_loss(torch.full((1, 2), 0.5), torch.ones(1, 2), torch.ones(1, 2), baseline=True)


@pytest.mark.parametrize("baseline", [False, True])
def test_hybrid_loss_equals_a_loop_over_samples_and_gates(baseline):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 3, generator=generator).double()
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    probability = torch.rand(6, 4, generator=generator).double()
    action = torch.bernoulli(probability, generator=generator)

    returned = [[0.0] * 4 for _ in range(6)]
    cross_entropy = [
        float(-torch.log(row.softmax(0)[label])) for row, label in zip(logits, labels, strict=True)
    ]
    for b in range(6):
        for g in range(4):
            later = sum(ALPHA / 4 for j in range(g, 4) if action[b, j] == 0)
            returned[b][g] = later - cross_entropy[b]
    policy_loss = 0.0
    for b in range(6):
        for g in range(4):
            others = [returned[other][g] for other in range(6) if other != b]
            advantage = returned[b][g] - (sum(others) / 5 if baseline else 0.0)
            p = float(probability[b, g])
            policy_loss -= advantage * math.log(p if action[b, g] else 1 - p) / 6
    expected = sum(cross_entropy) / 6 + 0.3 * policy_loss

    found = hybrid_loss(
        logits, labels, probability, action, alpha=ALPHA, policy_weight=0.3, baseline=baseline
    )
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_the_policy_gradient_does_not_reach_the_logits():
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    probability = torch.full((4, 2), 0.5, requires_grad=True)
    action = torch.tensor([[0.0, 1.0]] * 4)
    hybrid_loss(logits, labels, probability, action, alpha=0.1, policy_weight=7.0).backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    assert torch.equal(logits.grad, expected)
    assert (probability.grad != 0).all()


@pytest.mark.parametrize(("run_target", "earns"), [(0.0, True), (0.74, True), (0.76, False)])
def test_skipping_earns_nothing_once_few_enough_blocks_run(run_target, earns):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    # Two samples run everything, two run half: three quarters.
    probability = torch.tensor([[1.0, 1.0], [0.5, 0.5]] * 2)
    action = torch.tensor([[1.0, 1.0], [0.0, 1.0]] * 2)
    found = hybrid_loss(
        logits, labels, probability, action, alpha=2.0, policy_weight=1.0, run_target=run_target
    )
    alpha = 2.0 if earns else 0.0
    expected = hybrid_loss(logits, labels, probability, action, alpha=alpha, policy_weight=1.0)
    assert torch.equal(found, expected)


def test_a_target_counts_dear_blocks_for_more():
    probability = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert float(run_share(probability, weights=(3, 1))) == pytest.approx(3 / 8)
    assert float(run_share(probability)) == pytest.approx(1 / 4)


def test_what_nothing_drawn_earns_is_subtracted_from_each_return():
    logits, greedy_logits = torch.randn(2, 3), torch.randn(2, 3)
    labels = torch.tensor([2, 0])
    probability = torch.tensor([[0.9, 0.6, 0.2], [0.3, 0.5, 0.8]])
    action = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    greedy_action = (probability > 0.5).float()

    def earned(logits, action, b, g):
        skipped = sum(ALPHA / 3 for j in range(g, 3) if action[b, j] == 0)
        return skipped + float(logits[b].log_softmax(0)[labels[b]])

    expected = float(F.cross_entropy(logits, labels))
    for b in range(2):
        for g in range(3):
            advantage = earned(logits, action, b, g) - earned(greedy_logits, greedy_action, b, g)
            p = float(probability[b, g])
            expected -= 0.3 * advantage * math.log(p if action[b, g] else 1 - p) / 2
    found = hybrid_loss(
        logits,
        labels,
        probability,
        action,
        alpha=ALPHA,
        policy_weight=0.3,
        greedy=(greedy_logits, greedy_action),
    )
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_the_samples_own_reward_leaves_the_gradient_and_cuts_its_variance():
    # Two kinds of samples, one 5 nats harder, which no action changes.
    scores, generator = torch.tensor([0.4, -0.3]), torch.Generator().manual_seed(0)
    harder = torch.tensor([0.0, -5.0]).repeat(25)
    greedy_action = (scores > 0).float().expand(50, 2)
    greedy_return = returns_to_go(
        skip_rewards(greedy_action, ALPHA), FINAL[tuple(greedy_action[0].int().tolist())] + harder
    )
    found = {"none": [], "own": []}
    for _ in range(400):
        for name, subtracted in (("none", 0.0), ("own", greedy_return)):
            own = scores.clone().requires_grad_()
            probability = own.sigmoid().expand(50, 2)
            action = torch.bernoulli(probability.detach(), generator=generator)
            final = torch.tensor([FINAL[tuple(row)] for row in action.int().tolist()]) + harder
            returned = returns_to_go(skip_rewards(action, ALPHA), final)
            reinforce_loss(probability, action, returned - subtracted).backward()
            found[name].append(-own.grad)
    own = torch.stack(found["own"])
    error = own.std(0) / len(own) ** 0.5
    assert ((own.mean(0) - exact_gradient(scores)).abs() < 4 * error).all()
    assert own.var(0).sum() < torch.stack(found["none"]).var(0).sum() / 5
