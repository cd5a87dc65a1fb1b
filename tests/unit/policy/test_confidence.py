import math

import pytest
import torch

from offramp.errors import InvalidArgumentError, ShapeError
from offramp.policy.confidence import (
    CONFIDENCE_RULES,
    confidence_from_entropy_nats,
    entropy_confidence,
    margin_confidence,
    max_probability_confidence,
)

INF = math.inf


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_entropy_of_two_likely_classes_out_of_four():
    # Two halves and two impossible classes: H = log 2, so 1 - log 2 / log 4 = 1/2.
    assert entropy_confidence(logits_of(0.5, 0.5, 0, 0)).item() == pytest.approx(0.5)


def test_entropy_of_a_half_and_two_quarters():
    # H = 0.5 log 2 + 0.5 log 4 = 1.5 log 2, over log 3.
    expected = 1 - 1.5 * math.log(2) / math.log(3)
    assert entropy_confidence(logits_of(0.5, 0.25, 0.25)).item() == pytest.approx(expected)


def test_entropy_keeps_precision_near_certainty():
    # Two classes, p = sigmoid(12): H is 8.0e-5 nats, computed here in double precision.
    q = 1 / (1 + math.exp(12))
    entropy = -q * math.log(q) - (1 - q) * math.log1p(-q)
    confidence = entropy_confidence(torch.tensor([[12.0, 0.0]])).item()
    assert 1 - confidence == pytest.approx(entropy / math.log(2), rel=1e-2)


def test_max_probability_and_margin_by_hand():
    logits = logits_of(0.6, 0.3, 0.1)
    assert max_probability_confidence(logits).item() == pytest.approx(0.6)
    assert margin_confidence(logits).item() == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("rule", "unsure"), [("entropy", 0.0), ("max_probability", 1 / 3), ("margin", 0.0)]
)
def test_extremes_of_every_rule(rule, unsure):
    logits = torch.tensor([[2.0, 2.0, 2.0], [1e4, 0.0, -1e4], [0.0, -INF, -INF]])
    expected = torch.tensor([unsure, 1.0, 1.0])
    torch.testing.assert_close(CONFIDENCE_RULES[rule](logits), expected)


@pytest.mark.parametrize("rule", CONFIDENCE_RULES)
def test_nan_and_all_impossible_give_nan_for_their_row_only(rule):
    logits = torch.tensor([[math.nan, 0.0], [0.0, 9.0], [-INF, -INF], [INF, 0.0]])
    is_nan = CONFIDENCE_RULES[rule](logits).isnan()
    assert is_nan.tolist() == [True, False, True, True]


@pytest.mark.parametrize("rule", CONFIDENCE_RULES)
@pytest.mark.parametrize("shape", [(3, 1), (3, 0), ()])
def test_fewer_than_two_classes_are_refused(rule, shape):
    with pytest.raises(ShapeError, match="at least 2 classes"):
        CONFIDENCE_RULES[rule](torch.zeros(shape))


@pytest.mark.parametrize("rule", CONFIDENCE_RULES)
def test_half_precision_logits_are_computed_in_single_precision(rule):
    logits = torch.tensor([[1.0, 2.0, -3.0]], dtype=torch.float16)
    confidence = CONFIDENCE_RULES[rule](logits)
    assert confidence.dtype == torch.float32
    torch.testing.assert_close(confidence, CONFIDENCE_RULES[rule](logits.float()))


def test_threshold_from_entropy_decides_as_the_entropy_does():
    # 0.5 nats over log 47 = 3.850148 nats.
    assert confidence_from_entropy_nats(0.5, 47) == pytest.approx(1 - 0.5 / 3.850148, abs=1e-6)
    assert confidence_from_entropy_nats(0, 47) == 1
    assert confidence_from_entropy_nats(math.log(47), 47) == 0


@pytest.mark.parametrize("entropy_nats", [-0.01, 0.7, math.nan, INF])
def test_entropy_outside_its_range_is_refused(entropy_nats):
    with pytest.raises(InvalidArgumentError, match=r"\[0, 0\.693\] nats for 2 classes"):
        confidence_from_entropy_nats(entropy_nats, 2)
