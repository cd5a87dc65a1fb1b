import math

import pytest
import torch

from offramp import AgreementPolicy, DensePolicy
from offramp.errors import ArtifactError, InvalidArgumentError, ShapeError
from offramp.policy.as_dict import policy_from_dict, policy_to_dict
from offramp.policy.confidence import (
    DENSE_RULES,
    entropy_confidence,
    low_quantile_confidence,
    mean_entropy_confidence,
    mean_max_probability_confidence,
    pixel_share_confidence,
)

INF = math.inf


def share_by_loop(logits, pixel_threshold):
    """The share of sure pixels, pixel by pixel."""
    shares = []
    for image in logits.tolist():
        sure = total = 0
        for y in range(len(image[0])):
            for x in range(len(image[0][0])):
                values = [channel[y][x] for channel in image]
                top = 1 / sum(math.exp(value - max(values)) for value in values)
                sure += top >= pixel_threshold
                total += 1
        shares.append(sure / total)
    return shares


@pytest.fixture
def logits():
    return 3 * torch.randn(3, 4, 5, 6)


@pytest.mark.parametrize("pixel_threshold", [0.0, 0.4, 0.9, 1.0])
def test_pixel_share_equals_a_loop_over_pixels(logits, pixel_threshold):
    found = pixel_share_confidence(logits, pixel_threshold)
    assert found.tolist() == pytest.approx(share_by_loop(logits, pixel_threshold))


def test_means_are_means_over_pixels(logits):
    p = logits.softmax(1)
    entropy = [[entropy_confidence(image[:, y]) for y in range(5)] for image in logits.mT]
    assert mean_max_probability_confidence(logits).tolist() == pytest.approx(
        p.amax(1).flatten(1).mean(1).tolist()
    )
    by_pixel = entropy_confidence(logits.permute(0, 2, 3, 1).reshape(-1, 4)).reshape(3, -1)
    assert mean_entropy_confidence(logits).tolist() == pytest.approx(by_pixel.mean(1).tolist())
    assert len(entropy) == 3


def test_low_quantile_is_what_one_pixel_in_twenty_does_not_reach():
    tops = torch.linspace(0.5, 0.99, 40)  # the third lowest of 40
    logits = torch.stack([tops.log(), (1 - tops).log()]).reshape(1, 2, 5, 8)
    assert low_quantile_confidence(logits).item() == pytest.approx(tops[2].item(), abs=1e-6)


@pytest.mark.parametrize("rule", DENSE_RULES)
def test_a_pixel_that_is_no_number_keeps_its_image_in(rule, logits):
    logits[1, 0, 2, 3] = math.nan
    leave, confidence, _ = DensePolicy((0.0,), rule=rule).step(0, logits, ())
    assert confidence.isnan().tolist() == leave.logical_not().tolist() == [False, True, False]


@pytest.mark.parametrize("rule", DENSE_RULES)
@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 4, 4)])
def test_dense_rules_refuse_other_logits(rule, shape):
    with pytest.raises(ShapeError, match=r"dense logits of shape \(B, C, H, W\)"):
        DENSE_RULES[rule](torch.zeros(shape), 0.9)


def test_a_temperature_changes_which_pixels_are_sure():
    logits = torch.tensor([2.0, 0.0]).reshape(1, 2, 1, 1)  # 0.88 sure, and 0.98 at temperature 1/2
    assert DensePolicy((0.5,), pixel_threshold=0.9).step(0, logits, ())[1].item() == 0
    sharper = DensePolicy((0.5,), pixel_threshold=0.9, temperatures=(0.5, 1.0))
    assert sharper.step(0, logits, ())[1].item() == 1


def test_everybody_leaves_at_the_final_exit(logits):
    for policy in (DensePolicy((1.0,)), AgreementPolicy((1.0,))):
        leave, _, _ = policy.step(1, logits, ())
        assert leave.all()


def test_agreement_waits_for_a_second_opinion():
    first, second = torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4)
    first[:, 0] = second[0, 0] = 1
    second[1, 1, :, :1], second[1, 0, :, 1:] = 1, 1  # one pixel of four changes its class
    policy = AgreementPolicy((0.0, 0.8))
    leave, confidence, state = policy.step(0, first, ())
    assert leave.tolist() == [False, False]
    assert confidence.tolist() == [0, 0]
    leave, confidence, _ = policy.step(1, second, state)
    assert confidence.tolist() == [1, 0.75]
    assert leave.tolist() == [True, False]


@pytest.mark.parametrize(
    "policy",
    [
        DensePolicy((0.5, INF), pixel_threshold=0.7, temperatures=(1.0, 2.0, 0.5)),
        DensePolicy((0.5,), rule="low_quantile"),
        AgreementPolicy((INF, 0.9)),
    ],
)
def test_policies_survive_json(policy):
    assert policy_from_dict(policy_to_dict(policy)) == policy


@pytest.mark.parametrize("change", [{"rule": "entropy"}, {"pixel_threshold": 2}])
def test_damaged_policies_are_refused(change):
    with pytest.raises(ArtifactError, match="damaged"):
        policy_from_dict(policy_to_dict(DensePolicy((0.5,))) | change)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rule": "entropy"}, "must be one of pixel_share"),
        ({"pixel_threshold": math.nan}, r"'pixel_threshold' parameter must be in \[0, 1\]"),
        ({"temperatures": (1.0,)}, "must hold 2 positive numbers"),
        ({"thresholds": (1.5,)}, r"in \[0, 1\], or inf"),
    ],
)
def test_wrong_numbers_are_refused(arguments, words):
    with pytest.raises(InvalidArgumentError, match=words):
        DensePolicy(**{"thresholds": (0.5,)} | arguments)
